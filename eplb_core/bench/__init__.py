"""The benchmark behind `eplb bench`: a workload, the ranks that run it, and their results."""
