"""Runs a schedule so that no failure loses a slot."""
