"""Mappings of peers' GPU memory, by CUDA IPC, as a backend of `eplb`."""
