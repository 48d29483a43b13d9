"""What must move: arrays in, arrays out, no torch."""
