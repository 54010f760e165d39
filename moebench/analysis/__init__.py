"""Analysis of runs: statistics of paired seeds, the comparison of arms, its tables and its figures."""
