"""From a config string to an installed backend."""
