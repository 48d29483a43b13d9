"""From an installed backend to a communicator, on every rank or on none."""
