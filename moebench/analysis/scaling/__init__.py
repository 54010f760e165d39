"""Scaling laws: loss as a function of parameters and experts."""
