"""Whoever dies in the middle of a rearrangement: the survivors agree on every slot, and go on among themselves."""

from __future__ import annotations

import random

import pytest

from tests.support.kill_campaign import CONFIGS, problems_of

RANKS = 4  # three kills a campaign: of 4, 3 and 2 ranks
SEEDS = (2, 10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_survivors_of_kills_hold_what_they_say_and_rearrange_again(config: str, seed: int) -> None:
    assert problems_of(config, seed, RANKS) == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", CONFIGS)
def test_survivors_of_a_hundred_kills_hold_what_they_say(config: str) -> None:
    first = random.SystemRandom().randrange(1 << 30)
    print(f"seeds {first} to {first + 17}")
    problems = [problem for seed in range(first, first + 18) for problem in problems_of(config, seed, RANKS)]
    assert problems == []
