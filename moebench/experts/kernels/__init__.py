"""Grouped matrix products: one file per kernel."""
