"""Whole models mixed by a posterior: branch-train-merge without merging weights."""
