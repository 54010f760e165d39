"""Quality at equal tokens, FLOPs, parameters and time, and the speed-up to the baseline's quality."""
