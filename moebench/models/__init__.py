"""One transformer backbone, built from a configuration."""
