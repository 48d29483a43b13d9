"""The first-party backends: each is a separate package, registered through its own entry point."""
