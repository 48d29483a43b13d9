"""A vLLM plugin: its expert-parallel load balancer moves experts through `eplb`, over any backend."""
