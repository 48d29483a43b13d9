"""Reads inputs in a process of bounded memory and time: `python -m tests.fuzz.read_inputs KIND FILE...`.

With `--draw N --seed S` it draws N inputs more, made from those of the corpus. Prints one JSON line for each finding.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import CORPUS, TARGETS, Target

MEMORY_BYTES = 3 << 30  # beyond what torch has mapped: nothing in the corpus is larger than a few KB
SECONDS = 20
_TOKENS = (
    *(b"0", b"-1", b"1", b"4294967296", b"9223372036854775807", b"9223372036854775808", b"1" * 5000, b"1e999", b"NaN"),
    *(b"null", b"[]", b"{}", b'""', b"[[", b"}}", b'"\xff"', b"\x00", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\\ud800"),
    *(
        b"GiB",
        b"99999999h",
        b"?",
        b"&",
        b"=",
        b"@",
        b"%",
        b"inf",
        b"\xef\xbb\xbf",
        b"[" * 3000,
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    target = TARGETS[options.kind]
    for name, content in _seen_before(options.kind):  # all that is imported late is imported before memory is bounded
        with contextlib.suppress(BaseException):
            target.read(name, content)
            break
    _bound_memory()
    inputs = [(path.name, path.read_bytes()) for path in options.files]
    findings = sum(_try(target, name, content) for name, content in inputs)
    chance = random.Random(options.seed)
    seen = list(_seen_before(options.kind))
    for _ in range(options.draw):
        name, content = _drawn(chance, seen)
        findings += _try(target, name, content)
    return min(findings, 1)


def _seen_before(kind: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted((CORPUS / kind).iterdir()):
        yield path.name, path.read_bytes()


def _bound_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))


def _try(target: Target, name: str, content: bytes) -> int:
    """Return 1, and say so, if an input has done what none may."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        target.read(name, content)
    except target.own as error:
        str(error).encode()  # a message has to be fit to print
        return 0
    except BaseException as error:  # noqa: BLE001 - it is the finding
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        text = base64.b64encode(content).decode()
        finding = {"input": name, "error": f"{type(error).__name__}: {error}"[:300], "where": where, "content": text}
        print(json.dumps(finding), flush=True)
        return 1
    finally:
        signal.alarm(0)
    return 0


def _drawn(chance: random.Random, seen: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return an input of the corpus after a few random changes."""
    name, content = chance.choice(seen)
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        place = chance.randrange(len(changed) + 1)
        length = min(chance.choice((1, 1, 2, 4, 8, 40)), len(changed) - place)
        match chance.randrange(7):
            case 0 if changed:
                place = min(place, len(changed) - 1)
                changed[place] ^= 1 << chance.randrange(8)
            case 1:
                changed[place : place + length] = chance.choice(_TOKENS)
            case 2:
                changed[place:place] = chance.choice(_TOKENS)
            case 3:
                del changed[place : place + length]
            case 4:
                other = chance.choice(seen)[1]
                start = chance.randrange(len(other) + 1)
                changed[place : place + length] = other[start : start + chance.choice((1, 8, 64, 500))]
            case 5:
                changed[place:place] = changed[place : place + length] * chance.choice((1, 2, 50))
            case _:
                changed[place : place + length] = chance.randbytes(length)
    return name, bytes(changed)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # libraries that ran out of memory need not end well
