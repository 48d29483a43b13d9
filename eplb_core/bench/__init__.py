"""What `eplb bench` measures: a workload, the ranks that run it, and what they found."""
