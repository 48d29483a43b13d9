"""torch.distributed over gloo: works everywhere; tensors on a device are staged through pinned memory."""
