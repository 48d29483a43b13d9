"""`eplb watch`: a live view of rearrangements that other processes run."""
