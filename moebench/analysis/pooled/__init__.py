"""Several experiments together: pooled over tasks, and effective compute over sizes."""
