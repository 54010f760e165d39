"""Change the routing of a trained model and measure what this does to its quality."""
