"""Ranks on this machine: local processes with a deadline, and the GPU of each."""
