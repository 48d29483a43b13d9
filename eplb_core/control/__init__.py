"""Ranks that agree with one another over a store."""
