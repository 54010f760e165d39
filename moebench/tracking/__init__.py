"""Tracking: what a run measured goes to a local journal first, and to MLflow from there."""
