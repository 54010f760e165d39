"""What the experts of models of transformers have learned: the same report as that of a run."""
