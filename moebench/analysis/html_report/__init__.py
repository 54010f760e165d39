"""The report of an experiment as one HTML file: verdicts, tables, charts, settings, provenance."""
