"""Every JSON document of the command is described by a schema in the docs, field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from eplb_core.cli import main
from tests.support.fake_distributions import run_eplb
from tests.support.pages import DOCS, REPOSITORY

jsonschema = pytest.importorskip("jsonschema", reason="the extra eplb[dev] is not installed")

SCHEMAS = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "schemas").glob("*.json"))}
EXAMPLES = REPOSITORY / "examples"
LOADS, OLD, NEW = EXAMPLES / "published-loads.json", EXAMPLES / "placements/old.json", EXAMPLES / "placements/new.json"
STATUS = {
    "rank": 1,
    "ranks": 2,
    "epoch": 0,
    "phase": "finished",
    "ready_layers": [],
    "error": None,
    "steps": 1,
    "steps_committed": 1,
    "bytes_received": 5,
    "bytes_to_receive": 5,
    "requested": [[1, 0]],
    "effective": [[1, 0]],
}
BENCH = "bench --ranks 2 --layers 1 --slots 4 --steps 2 --expert-bytes 4kB --backend torch_gloo"


def in_process(*arguments: object) -> Any:
    """Run a command that starts no ranks, and return its document."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def in_a_child(line: str, cwd: Path) -> Any:
    done = run_eplb(*line.split(), "--json", "-", cwd=cwd, timeout_s=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def workload(folder: Path) -> Path:
    path = folder / "w.npz"
    placements = np.array([[[0, 1, 2, 3]], [[2, 3, 0, 1]]])
    np.savez(path, placements=placements, tensor_bytes=np.array([64]), ranks=np.array(2))
    return path


def status_file(folder: Path) -> Path:
    path = folder / "status.json"
    path.write_text(json.dumps(STATUS))
    return path


DOCUMENTS: dict[str, Callable[[Path], Any]] = {
    "backends-1": lambda folder: in_process("backends"),
    "bench-1": lambda folder: in_a_child(BENCH, folder),
    "bench-comparison-1": lambda folder: in_a_child(f"{BENCH} --rounds 2", folder),
    "config-explain-1": lambda folder: in_process("config", "explain", "nixl?window=1MiB"),
    "conformance-1": lambda folder: in_a_child("conformance torch_gloo --ranks 2 --check odd_sizes_arrive", folder),
    "conformance-list-1": lambda folder: in_process("conformance", "--list"),
    "doctor-1": lambda folder: in_a_child("doctor torch_gloo --device cpu --size 1MiB", folder),
    "placement-show-1": lambda folder: in_process("placement", "show", NEW, "--loads", LOADS),
    "placement-diff-1": lambda folder: in_process("placement", "diff", OLD, NEW, "--expert-bytes", "1kB"),
    "plugins-1": lambda folder: in_process("plugins"),
    "rebalance-1": lambda folder: in_a_child("demo --ranks 2 --backend torch_gloo", folder),
    "rebalance-declined-1": lambda folder: in_a_child(
        f"rebalance {LOADS} --model mixtral-8x7b --scale 1/1024 --ranks 2 --if-worth-it --cost steps=0", folder
    ),
    "simulate-1": lambda folder: in_process("simulate", "--rebalances", 2, "--layers", 2),
    "simulate-workload-1": lambda folder: in_process("simulate", "--workload", workload(folder)),
    "watch-1": lambda folder: in_process("watch", "--once", status_file(folder)),
}
"""Schema -> a real document of it."""


def closed(schema: Any) -> Any:
    """Return the schema with no field allowed but those that it describes."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema:
        inner.setdefault("additionalProperties", False)
    return inner


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_a_document_has_the_fields_of_its_schema_and_no_other(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name](tmp_path)
    problems = jsonschema.Draft202012Validator(closed(SCHEMAS[name])).iter_errors(document)
    assert [f"{problem.json_path}: {problem.message[:300]}" for problem in problems] == []
    assert document["format"] == "eplb-" + name.replace("-1", "/1")


def test_every_document_that_the_command_writes_has_a_schema_and_every_schema_a_document() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "eplb_core/cli").rglob("*.py"))
    written = {name.replace("/", "-") for name in re.findall(r'"([a-z-]+/\d+)"\)', sources)}
    assert written == set(SCHEMAS) == set(DOCUMENTS)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_schema_is_one_and_describes_every_field(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    nameless = []

    def visit(schema: Any, path: str) -> None:
        if isinstance(schema, dict):
            for key, field in schema.get("properties", {}).items():
                if not field.get("description"):
                    nameless.append(f"{path}.{key}")
                visit(field, f"{path}.{key}")
            for key in ("items", "additionalProperties"):
                visit(schema.get(key), f"{path}[]")

    visit(SCHEMAS[name], name)
    assert nameless == []


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_page_lists_every_schema(name: str) -> None:
    row = rf"\| `eplb-{name.replace('-1', '/1')}` \| .* \| \[.*\]\(.*schemas/{name}\.json\) \|"
    assert re.search(row, (DOCS / "json.md").read_text())
