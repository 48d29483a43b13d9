"""What a rebalance reads: recorded loads, placements, and the weights of experts."""
