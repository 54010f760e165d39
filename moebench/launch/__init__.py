"""Start, watch and stop the processes of a cell; diagnose failures."""
