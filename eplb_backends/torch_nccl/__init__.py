"""torch.distributed over NCCL, on the engine's own device group; the default backend."""
