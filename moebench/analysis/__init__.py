"""What the runs say: statistics of paired seeds, the comparison of arms, its tables and its figures."""
