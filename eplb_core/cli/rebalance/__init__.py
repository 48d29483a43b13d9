"""`eplb rebalance`."""
