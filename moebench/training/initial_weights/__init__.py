"""Weights before the first step that come from a parent: another run, or a model of transformers."""
