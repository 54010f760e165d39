"""Tracking: metrics are written to a local journal first and sent from there to MLflow."""
