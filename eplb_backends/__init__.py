"""The first-party backends, each a module of its own that registers itself through its own entry point."""
