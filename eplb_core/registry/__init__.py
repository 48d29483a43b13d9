"""Finds the installed backend for a config string."""
