"""Transfer: what runs that start from a trained model gain on the new data, and what they lose on the old ones."""
