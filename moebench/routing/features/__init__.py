"""Context features: what some routers need besides token vectors, ids and domains; one file each."""
