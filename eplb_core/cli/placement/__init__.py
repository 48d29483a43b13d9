"""`eplb placement`: convert placement files, draw one, and draw what changes between two."""
