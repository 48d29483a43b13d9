"""A plugin of vLLM: its expert-parallel load balancer moves experts through `eplb`, over whichever backend is named."""
