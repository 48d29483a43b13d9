"""Random faults in the middle of rearrangements, in real processes: what every rank holds and says afterwards.

    python -m eplb_core.testing.campaign --hours 1

Everything random follows from a seed: who fails, how, when, and what it was doing. After each fault every rank says
what its slots hold, every slot is compared byte for byte with what was said, and those that are left rearrange again.
"""
