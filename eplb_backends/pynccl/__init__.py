"""NCCL without torch.distributed: over the engine's own communicator, or one of its own made with nccl4py."""
