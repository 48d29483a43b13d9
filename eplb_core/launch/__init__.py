"""Ranks on this machine: local processes with deadlines, and the GPU of each."""
