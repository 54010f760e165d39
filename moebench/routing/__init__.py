"""WHERE tokens go: routers, the values they return, losses and load metrics. Needs torch alone."""
