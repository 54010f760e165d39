"""Describe which expert takes which tokens of a trained model."""
