"""A plugin of SGLang: its expert-parallel load balancer moves experts through `eplb`, over the backend you name."""
