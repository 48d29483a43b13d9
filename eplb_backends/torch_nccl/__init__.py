"""torch.distributed over NCCL, on the engine's device group; the default backend."""
