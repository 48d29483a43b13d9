"""torch.distributed over gloo: works everywhere; device tensors are staged through pinned memory."""
