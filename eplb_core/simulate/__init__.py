"""Many rebalances at any scale, without weights: what a policy's placements cost to reach, and what they are worth."""
