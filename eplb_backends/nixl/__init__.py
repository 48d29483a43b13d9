"""One-sided READs over NIXL: the receiver fetches its experts from the senders' memory, on DRAM and VRAM."""
