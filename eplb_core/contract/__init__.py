"""What a backend promises, and what it is given."""
