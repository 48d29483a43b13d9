"""NCCL without torch.distributed: over the engine's communicator, or a new one made with nccl4py."""
