"""moebench: which router? Sparse-expert routing algorithms compared under matched conditions."""

__version__ = "0.1.0"
