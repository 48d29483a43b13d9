"""What has to move: arrays in, arrays out, no torch."""
