"""`python -m eplb_core.testing.campaign`: as many trials as time allows, and a table of what came of them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

from eplb_core.errors import EplbError, InputError
from eplb_core.registry.entry import BackendState
from eplb_core.registry.registry import default_registry
from eplb_core.testing.campaign.episode import run_episode
from eplb_core.testing.campaign.plan import KINDS
from eplb_core.testing.campaign.report import Report, problems_of
from eplb_core.testing.campaign.verdict import judge

_HOUR_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return 0 if every promise was kept, 1 if one was not, 2 if it cannot be run as asked."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as asked:  # argparse has said why
        return int(asked.code or 0)
    try:
        return _run(options)
    except EplbError as error:
        print("error: " + "; ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eplb_core.testing.campaign", description=__doc__)
    parser.add_argument(
        "--backend", action="append", metavar="CONFIG", help="again and again for several; default: all that are ready"
    )
    parser.add_argument("--ranks", type=_count(2, 16), default=4, help="processes of one episode at first (4)")
    parser.add_argument("--hours", type=_positive, help="begin nothing new after this time")
    parser.add_argument("--trials", type=_count(1, 10**7), help="begin nothing new after so many trials")
    parser.add_argument("--episodes", type=_count(1, 10**7), help="sets of processes; default: one for each backend")
    parser.add_argument("--seed", type=_count(0, 1 << 62), help="of the first episode, the next one has the next")
    parser.add_argument("--faults", metavar="KIND,...", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--timeout", type=_positive, default=2.0, help="of the communicators, in seconds (2)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, after each episode")
    return parser


def _run(options: argparse.Namespace) -> int:
    kinds = tuple(KINDS) if options.faults is None else tuple(options.faults.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        print(f"error: there is no fault {unknown[0]!r}; there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    configs = options.backend or _ready()
    _write(Report(options.timeout), options.json)  # else it would be found out when the first trials are over
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    report = Report(options.timeout)
    began = time.monotonic()
    print(f"seeds from {seed}, backends {', '.join(configs)}, timeout {options.timeout:g} s", flush=True)
    interrupted = False
    try:
        for number, config in enumerate(itertools.cycle(configs)):
            if _is_over(options, number, report, time.monotonic() - began, len(configs)):
                break
            episode = run_episode(config, seed + number, options.ranks, kinds=kinds, timeout_s=options.timeout)
            verdicts = judge(episode, options.timeout)
            report.episodes.append((episode, verdicts))
            report.seconds = time.monotonic() - began
            problems = problems_of(episode, verdicts, options.timeout)
            _say(
                f"seed {episode.seed}, {config}: {len(verdicts)} trials in {episode.seconds:.0f} s, "
                f"{report.trials} so far",
                problems,
            )
            _write(report, options.json)
    except KeyboardInterrupt:
        interrupted = True
    print("\n" + report.table())
    print(f"{report.trials} trials in {report.seconds:.0f} s, {len(report.problems)} problems")
    return 130 if interrupted else int(bool(report.problems))


def _is_over(options: argparse.Namespace, episodes: int, report: Report, seconds: float, backends: int) -> bool:
    if options.hours is not None and seconds >= options.hours * _HOUR_S:
        return True
    if options.trials is not None and report.trials >= options.trials:
        return True
    if options.episodes is not None:
        return bool(episodes >= options.episodes)
    return options.hours is None and options.trials is None and episodes >= backends


def _ready() -> list[str]:
    """Return the backends that can move tensors of a CPU here."""
    ready = []
    for entry in default_registry().entries():
        spec = entry.spec
        if (
            entry.state is not BackendState.READY
            or spec is None
            or spec.capabilities.unfit("cpu", stateless=False, has_device_group=False)
        ):
            continue
        ready.append(entry.name)
    return ready


def _say(line: str, problems: Sequence[str]) -> None:
    print(line, flush=True)
    for problem in problems:
        print(f"PROBLEM {problem}", flush=True)


def _write(report: Report, path: str | None) -> None:
    if path is None:
        return
    try:
        # Whoever ends the campaign in this moment keeps what was there.
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(report.document(), file, indent=1)
            file.write("\n")
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise InputError(f"cannot write {path}", why=error.strerror or str(error)) from error


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("it must be above 0")
    return value


def _count(least: int, most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"it must be from {least} to {most}")
        return value

    return count


if __name__ == "__main__":
    sys.exit(main())
