"""One file per routing algorithm. A new file here is a new router; nothing else is edited."""
