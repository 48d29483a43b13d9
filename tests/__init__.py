"""The tests of eplb, in folders that mirror the rooms of `eplb_core`."""
