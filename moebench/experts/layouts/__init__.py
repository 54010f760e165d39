"""One file per expert layout. A new file here is a new layout; nothing else is edited."""
