"""Ranks on this machine: local processes with a deadline."""
