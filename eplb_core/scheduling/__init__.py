"""In which bounded steps it moves: arrays in, arrays out, no torch."""
