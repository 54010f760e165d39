"""Show how routing comes about in training, and what of it is the same in every seed."""
