"""Trivial baselines of the tasks: what counting, compressing or a linear model reaches on the same evaluation data."""
