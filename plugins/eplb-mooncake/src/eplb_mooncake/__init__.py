"""Mooncake's Transfer Engine as a backend of `eplb`."""
