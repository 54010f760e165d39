"""Compare the arms of an experiment: statistics, ranking, tables and figures."""
