"""The inputs of a rebalance: recorded loads, placements, and the weights of experts."""
