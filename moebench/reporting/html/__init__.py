"""Pages in one file: templates, style sheet, tables and charts as HTML and SVG."""
