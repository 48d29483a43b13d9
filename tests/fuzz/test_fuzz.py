"""Nothing is believed that a file, a string or a message merely claims: only errors of eplb, in bounded memory.

Each kind of input has a folder of the corpus. What a night finds belongs there, so that every day tries it again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import CORPUS, TARGETS

REPOSITORY = Path(__file__).parents[2]
BY_NIGHT = 20_000


def findings(kind: str, *arguments: str, timeout_s: float = 110.0) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "tests.fuzz.read_inputs", kind, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == int(bool(found)), done.stderr[-2000:]
    return found


@pytest.mark.parametrize("kind", TARGETS)
def test_every_input_of_the_corpus_is_read_or_refused_by_an_error_of_eplb(kind: str) -> None:
    files = sorted(map(str, (CORPUS / kind).iterdir()))
    assert len(files) >= 10
    assert findings(kind, *files) == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_night_of_drawn_inputs_brings_nothing_but_errors_of_eplb(kind: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    found = findings(kind, "--draw", str(BY_NIGHT), "--seed", str(seed), timeout_s=3500.0)
    for finding in found:
        content = base64.b64decode(finding["content"])
        name = f"{hashlib.sha256(content).hexdigest()[:12]}-{finding['input']}"
        (tmp_path / name).write_bytes(content)
        print(f"{tmp_path / name}: {finding['error']} at {finding['where']}; put it into {CORPUS / kind}")
    assert [(finding["error"], finding["where"]) for finding in found] == []


def test_a_reader_that_lets_a_foreign_error_out_is_a_finding(tmp_path: Path) -> None:
    from tests.fuzz import read_inputs
    from tests.fuzz.targets import Target

    def read(_name: str, content: bytes) -> None:
        raise KeyError(content)

    assert read_inputs._try(Target(read), "x", b"y") == 1
    assert read_inputs._try(Target(lambda name, content: None), "x", b"y") == 0
