"""The backend contract: what a backend promises and what it receives."""
