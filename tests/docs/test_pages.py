"""What the documentation shows is true: its code runs, its commands print what it says, and nothing is left out."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import eplb_core
from eplb_core import errors, transport
from eplb_core.cli import main as eplb_command
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.options import option_types
from eplb_core.registry.registry import default_registry, load_options_class
from tests.support.fake_distributions import install, run_child, run_eplb
from tests.support.pages import BLOCKS, DOCS, PAGES, REPOSITORY, Block, blocks_of, marked
from tests.support.programs import run_program


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_code_in_the_docs_compiles(block: Block) -> None:
    compile(textwrap.dedent(block.code), str(block), "exec")


@pytest.mark.parametrize("block", marked("run"), ids=str)
def test_a_program_in_the_docs_runs(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.code)

    child = run_child([str(program)], cwd=tmp_path)

    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("block", marked("two-ranks"), ids=str)
def test_a_program_for_two_ranks_in_the_docs_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.code)
    monkeypatch.chdir(tmp_path)

    ended = run_program(program, 2)

    assert [outcome.exit_code for outcome in ended] == [0, 0], ended
    assert all(outcome.succeeded for outcome in ended), ended


def test_such_a_program_runs_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(marked("two-ranks")[0].code)

    child = run_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)], cwd=tmp_path)

    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("block", marked("exact"), ids=str)
def test_a_command_in_the_docs_prints_what_they_show(block: Block, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for session in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, _, shown = session.partition("\n")
        words = shlex.split(line)
        environment = {"COLUMNS": "100"}
        while "=" in words[0] and words[0].isascii():
            name, _, environment[name] = words.pop(0).partition("=")
        assert words.pop(0) == "eplb"

        child = run_eplb(*words, cwd=tmp_path, environment=environment)

        assert (child.stdout + child.stderr).split() == shown.split(), line


# What a run measures, and what the scheduling of processes decides.
_MEASURED = re.compile(r"\d+(\.\d+)? (s|ms|[kMG]B/s|batches)\b|(?<=peak staging)( +\S+ \S+)|(?<=rate) +.*")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", marked("output"), ids=str)
def test_a_run_in_the_docs_prints_what_they_show_but_for_what_is_measured(block: Block, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for program in blocks_of(block.page):
        if program.caption.endswith(".py") and program.language == "python":
            (tmp_path / program.caption).write_text(program.code)
    for session in _sessions(block):
        line, _, shown = session.partition("\n")
        if "demo-checkpoint" in line and "make-checkpoint" not in line and not (tmp_path / "demo-checkpoint").exists():
            assert run_eplb("make-checkpoint", "demo-checkpoint", cwd=tmp_path).returncode == 0
        words = shlex.split(line)
        if words[0] == "torchrun":
            child = run_child(["-m", "torch.distributed.run", "--standalone", *words[1:]], cwd=tmp_path, timeout_s=120)
        else:
            child = run_eplb(*words[1:], cwd=tmp_path, environment={"COLUMNS": "100"}, timeout_s=120)

        assert child.returncode == 0, child.stderr
        assert _MEASURED.sub("", child.stdout).split() == _MEASURED.sub("", shown).split(), line


def _sessions(block: Block) -> list[str]:
    return re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]


def test_every_block_of_a_console_is_tested_or_marked_as_an_excerpt() -> None:
    shown = [block for block in BLOCKS if block.language == "console" and not block.mark]
    assert [str(block) for block in shown if any(line and line[0] != "$" for line in block.code.splitlines())] == []
    assert all("excerpt" in block.options["caption"].lower() for block in marked("excerpt"))


# --- the backend of the README ----------------------------------------------------------------------------------------


def readme_files() -> dict[str, str]:
    """Return the files that the README shows: their first line is a comment with their path."""
    blocks = [block.code for block in blocks_of(REPOSITORY / "README.md") if block.code.startswith("# acme_eplb/")]
    return {code.partition("\n")[0].removeprefix("# "): code for code in blocks}


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """The folder that the README's backend is installed in."""
    (shown,) = [block.code for block in blocks_of(REPOSITORY / "README.md") if block.language == "toml"]
    backends = tomllib.loads(shown)["project"]["entry-points"]["eplb.backends"]
    installed = install(tmp_path / "site", "acme-eplb", backends=backends)
    for path, code in readme_files().items():
        (installed / path).parent.mkdir(exist_ok=True)
        (installed / path).write_text(code)
    return installed


def test_the_backend_in_fifteen_lines_moves_a_checkpoint_between_two_ranks(acme: Path, tmp_path: Path) -> None:
    loads = REPOSITORY / "examples/published-loads.json"

    made = run_eplb("make-checkpoint", "demo", cwd=tmp_path)
    moved = run_eplb(
        "rebalance", str(loads), "--checkpoint=demo", "--ranks=2", "--backend=acme", path=[acme], cwd=tmp_path
    )

    assert made.returncode == 0, made.stderr
    assert moved.returncode == 0, moved.stderr
    assert re.search(r"verified +yes", moved.stdout), moved.stdout


@pytest.mark.timeout(300)
def test_it_keeps_the_whole_contract(acme: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"`(eplb conformance acme [^`]*)`", (REPOSITORY / "README.md").read_text())

    child = run_eplb(*shlex.split(command)[1:], path=[acme], cwd=tmp_path, timeout_s=280)

    assert child.returncode == 0, child.stdout + child.stderr
    assert "acme with 3 ranks on cpu conforms" in child.stdout


def test_its_class_takes_fifteen_lines() -> None:
    code = readme_files()["acme_eplb/communicator.py"]
    body = code[code.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


# --- nothing is left out ----------------------------------------------------------------------------------------------


def _first_party_backends() -> list[str]:
    return sorted(
        tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["eplb.backends"]
    )


def _plugins() -> list[str]:
    return sorted(path.parent.name for path in (REPOSITORY / "plugins").glob("*/pyproject.toml"))


def _error_classes() -> list[str]:
    return [
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.EplbError)
    ]


@pytest.mark.parametrize("name", _error_classes())
def test_every_error_has_a_section_on_the_errors_page(name: str) -> None:
    assert re.search(rf"^### {name}$", (DOCS / "errors.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(eplb_core.__all__) - {"__version__"}))
def test_every_exported_name_is_in_the_api_reference(name: str) -> None:
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    in_errors = name in _error_classes() and "automodule:: eplb_core.errors" in pages
    assert in_errors or re.search(rf":: eplb_core\.(?:\w+\.)*{name}(?:\(\))?$", pages, re.MULTILINE)


@pytest.mark.parametrize("name", transport.__all__)
def test_every_name_for_authors_of_backends_is_in_the_api_reference(name: str) -> None:
    assert re.search(rf":: eplb_core\.transport\.{name}$", (DOCS / "api/transport.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("backend", _first_party_backends())
def test_every_option_of_a_first_party_backend_is_documented_with_its_default(backend: str) -> None:
    page = (DOCS / "backends.md").read_text()
    section = page[page.index(f"## {backend}") :].partition("\n## ")[0]
    entry = next(entry for entry in default_registry().entries() if entry.choice == f"{backend}@eplb")
    options_class = load_options_class(entry)
    assert issubclass(options_class, CommonOptions)
    defaults = {field.name: field.default for field in dataclasses.fields(options_class)}
    for key, kind in option_types(options_class).items():
        assert re.search(rf"^\| `{key}` \|.*\| `{kind.format(defaults[key])}` \|", section, re.MULTILINE), key


@pytest.mark.parametrize("backend", _first_party_backends())
def test_every_first_party_backend_is_in_the_directory_of_plugins(backend: str) -> None:
    assert re.search(rf"^\| `{backend}` \|.*\| `pip install ", (DOCS / "plugins.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("plugin", _plugins())
def test_every_plugin_is_in_the_directory_with_what_it_registers(plugin: str) -> None:
    project = tomllib.loads((REPOSITORY / "plugins" / plugin / "pyproject.toml").read_text())["project"]
    for names in project["entry-points"].values():
        for name in names:
            row = rf'^\| `{name}` \|.*\| `pip install "?{plugin}\b.*`plugins/{plugin}` \| (alpha|stable) \|$'
            assert re.search(row, (DOCS / "plugins.md").read_text(), re.MULTILINE)


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        elif command is not None:
            yield (*path, name), command


def test_every_command_and_each_of_its_options_is_documented() -> None:
    page = (DOCS / "commands.md").read_text()
    missing = []
    for path, command in _commands(eplb_command):
        heading = f"## eplb {' '.join(path)}"
        if heading not in page:
            missing.append(heading)
            continue
        section = page[page.index(heading) :].partition("\n## ")[0]
        options = [name for each in command.params if isinstance(each, click.Option) for name in each.opts]
        missing += [f"{heading}: {name}" for name in options if f"`{name}" not in section]
    assert not missing


@pytest.mark.parametrize(
    "page", [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_pages_hold_code_of_every_kind_that_is_tested() -> None:
    assert all(marked(mark) for mark in ("run", "two-ranks", "exact", "tutorial"))
