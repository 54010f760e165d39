"""Tasks: data, input embedding, head, loss and metrics; nothing about routing."""
