"""Measure a trained model under varied settings."""
