"""What a run is on disk: cell, folder, journal, result, environment."""
