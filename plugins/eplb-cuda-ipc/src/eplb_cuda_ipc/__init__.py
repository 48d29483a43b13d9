"""Peers' GPU memory, mapped by CUDA IPC, as a backend of `eplb`."""
