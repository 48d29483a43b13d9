"""Whoever fails in the middle of a rearrangement: the others agree on every slot, and go on among themselves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from eplb_core.testing.campaign.episode import Episode, run_episode
from eplb_core.testing.campaign.plan import KINDS
from eplb_core.testing.campaign.report import problems_of
from eplb_core.testing.campaign.verdict import judge

RANKS = 4
TIMEOUT_S = 3.0
CONFIGS = ("torch_gloo", "nixl?mode=packed&window=1MiB", "nixl?mode=direct&window=4MiB")
KILLS = ((CONFIGS[0], 2), (CONFIGS[1], 10), (CONFIGS[2], 3))  # three kills each: of 4, 3 and 2 ranks
OTHERS = tuple(kind for kind in KINDS if kind not in ("none", "slow", "kill"))


def problems_with(config: str, seed: int, kinds: tuple[str, ...]) -> list[str]:
    episode = run_episode(config, seed, RANKS, kinds=kinds, timeout_s=TIMEOUT_S)
    return problems_of(episode, judge(episode, TIMEOUT_S), TIMEOUT_S)


@pytest.mark.parametrize(("config", "seed"), KILLS)
def test_survivors_of_kills_hold_what_they_say_and_rearrange_again(config: str, seed: int) -> None:
    assert problems_with(config, seed, ("kill",)) == []


def test_after_every_other_kind_of_fault_ranks_hold_what_they_say_and_rearrange_again() -> None:
    assert problems_with(CONFIGS[1], 41, OTHERS) == []


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("config", CONFIGS)
def test_two_hundred_faults_leave_every_promise_kept(config: str) -> None:
    first = random.SystemRandom().randrange(1 << 30)
    print(f"seeds from {first}")
    problems: list[str] = []
    tried = 0
    for seed in range(first, first + 200):
        episode = run_episode(config, seed, RANKS, timeout_s=TIMEOUT_S)
        verdicts = judge(episode, TIMEOUT_S)
        problems += problems_of(episode, verdicts, TIMEOUT_S)
        tried += len(verdicts)
        if tried >= 200:
            break
    assert problems == []


# --- the command -----------------------------------------------------------------------------------------------------


def campaign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eplb_core.testing.campaign", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd, env=dict(os.environ))


def test_the_command_prints_its_seed_and_a_table_and_writes_what_was_tried(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--backend", "torch_gloo", "--ranks", "2", "--faults", "kill", "--seed", "5", "--episodes", "1")
    done = campaign(*options, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seeds from 5, backends torch_gloo, timeout 2 s\n")
    assert "1 trials in" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("kill "))
    assert row.split()[1] == "1"
    document = json.loads(file.read_text())
    assert (document["trials"], document["problems"]) == (1, [])
    (trial,) = document["episodes"][0]["trials"]
    assert trial["tried"].startswith("trial 0, 2 ranks, ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--faults", "flood"), "there is no fault 'flood'; there are none, slow, kill"),
        (("--backend", "nixll"), "nixll"),
        (("--ranks", "1"), "it must be from 2 to 16"),
        (("--hours", "0"), "it must be above 0"),
        (("--json", "/nonexistent/found.json", "--episodes", "1"), "/nonexistent/found.json"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_started(options: tuple[str, ...], said: str) -> None:
    done = campaign(*options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "trials in" not in done.stdout


def test_ranks_that_tell_nothing_are_a_finding() -> None:
    episode: Episode = run_episode("torch_gloo", 5, 2, kinds=("none",), timeout_s=TIMEOUT_S)
    assert judge(episode, TIMEOUT_S)[0].problems == []
    del episode.told[0][1]
    (verdict,) = judge(episode, TIMEOUT_S)
    assert [promise for promise, _ in verdict.problems] == ["ended"]
