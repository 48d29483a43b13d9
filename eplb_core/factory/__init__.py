"""Builds communicators from installed backends, on every rank or on none."""
