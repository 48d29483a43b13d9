"""Phrases shared by errors and reports."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the nearest known words, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=2)
    return f", did you mean {' or '.join(repr(other) for other in near)}?" if near else ""


def word_list(words: Sequence[str], last: str) -> str:
    """Return `a, b and c`; `last` is the word before the last one."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def count(number: int, noun: str) -> str:
    """Return `1 layer` or `58 layers`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ranks_text(ranks: Iterable[int]) -> str:
    """Return `rank 3` or `ranks 1, 3`."""
    numbers = sorted(ranks)
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGSEGV."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
