"""`eplb doctor`."""
