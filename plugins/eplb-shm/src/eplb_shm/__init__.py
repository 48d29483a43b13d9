"""Shared memory between the CPU ranks of one host, as a backend of `eplb`."""
