"""Tables, numbers and figures as text, Markdown, JSON and PNG."""
