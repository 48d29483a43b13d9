"""What the documentation shows is true: its code runs, its commands print what it says, and nothing is left out."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from fake_distributions import install, run_child, run_eplb

import eplb_core
from eplb_core import errors
from eplb_core.backend import CommonOptions
from eplb_core.cli import main as eplb_command
from eplb_core.options import option_types
from eplb_core.registry import default_registry, load_options_class

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)

_FENCE = re.compile(r"^```(?:\{code-block\} )?(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r":([\w-]+): *(.*)\n")
_NO_MARKUP = str.maketrans("", "", '"`')


@dataclass(frozen=True)
class Block:
    """One block of code of a page, with the directive's options."""

    page: Path
    line: int
    language: str
    options: dict[str, str]
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(DOCS)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        body, options = fence[2], {}
        while option := _OPTION.match(body):
            options[option[1]] = option[2]
            body = body[option.end() :]
        yield Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], options, body.lstrip("\n"))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def marked(mark: str) -> list[Block]:
    return [block for block in BLOCKS if block.options.get("class") == mark]


def captioned(page: str) -> dict[str, str]:
    """Return the files that a page shows: caption -> content."""
    return {
        b.options["caption"].translate(_NO_MARKUP): b.code for b in blocks_of(DOCS / page) if "caption" in b.options
    }


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_code_in_the_docs_compiles(block: Block) -> None:
    compile(block.code, str(block), "exec")


@pytest.mark.parametrize("block", marked("run"), ids=str)
def test_a_program_in_the_docs_runs(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.code)

    child = run_child([str(program)], cwd=tmp_path)

    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("block", marked("two-ranks"), ids=str)
def test_a_program_for_two_ranks_in_the_docs_runs_under_torchrun(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.code)

    child = run_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)], cwd=tmp_path)

    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("block", marked("exact"), ids=str)
def test_a_command_in_the_docs_prints_what_they_show(block: Block, tmp_path: Path) -> None:
    for session in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, _, shown = session.partition("\n")
        words = shlex.split(line)
        environment = {"COLUMNS": "100"}
        while "=" in words[0] and words[0].isascii():
            name, _, environment[name] = words.pop(0).partition("=")
        assert words.pop(0) == "eplb"

        child = run_eplb(*words, cwd=tmp_path, environment=environment)

        assert (child.stdout + child.stderr).split() == shown.split(), line


# --- the backend of write-a-backend.md --------------------------------------------------------------------------------


def install_acme(folder: Path, *, complete: bool) -> Path:
    """Install what the page shows, with the entry point of its pyproject.toml."""
    shown = captioned("write-a-backend.md")
    project = tomllib.loads(shown["pyproject.toml"])["project"]
    install(folder, project["name"], version=project["version"], backends=project["entry-points"]["eplb.backends"])
    package = folder / "acme_eplb"
    package.mkdir()
    spec = shown["acme_eplb/__init__.py"]
    if complete:
        more = '    options="acme_eplb.communicator:AcmeOptions",\n    probe="acme_eplb.probe:probe",\n'
        spec = spec.replace("    capabilities=", more + "    capabilities=")
    (package / "__init__.py").write_text(spec)
    (package / "communicator.py").write_text(shown["acme_eplb/communicator.py" + (", complete" if complete else "")])
    (package / "probe.py").write_text(shown["acme_eplb/probe.py"])
    return folder


def test_the_backend_in_twenty_lines_moves_a_checkpoint_between_two_ranks(tmp_path: Path) -> None:
    installed = install_acme(tmp_path / "site", complete=False)
    (tmp_path / "published-loads.json").write_bytes((REPOSITORY / "examples/published-loads.json").read_bytes())
    (commands,) = marked("try")

    for line in commands.code.splitlines():
        words = shlex.split(line)
        if words[0] == "eplb":
            child = run_eplb(*words[1:], path=[installed], cwd=tmp_path)
            assert child.returncode == 0, child.stderr

    assert re.search(r"verified +yes", child.stdout), child.stdout


def test_its_execute_takes_about_twenty_lines() -> None:
    code = captioned("write-a-backend.md")["acme_eplb/communicator.py"]
    body = code[code.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 25


# All of the kit takes half a minute; these are what distinguishes the complete file from the twenty lines.
_CHECKS = (
    "every_dtype_arrives_bit_for_bit",
    "tensors_without_elements_are_sent",
    "received_data_is_there_on_return",
    "another_size_is_a_mismatch_everywhere",
    "a_closed_communicator_refuses_everything_else",
    "a_rank_that_does_not_execute_is_named_within_the_timeout",
)


def test_the_complete_backend_keeps_the_contract(tmp_path: Path) -> None:
    installed = install_acme(tmp_path / "site", complete=True)

    child = run_eplb(
        "conformance", "acme?part=64KiB", *(f"--check={check}" for check in _CHECKS), path=[installed], cwd=tmp_path
    )

    assert child.returncode == 0, child.stdout + child.stderr


def test_its_probe_says_that_it_works(tmp_path: Path) -> None:
    installed = install_acme(tmp_path / "site", complete=True)

    child = run_eplb("backends", "--probe", "--json", "-", path=[installed], cwd=tmp_path)

    acme = next(entry for entry in json.loads(child.stdout)["backends"] if entry["name"] == "acme")
    assert acme["state"] == "ready"
    assert acme["probe"] == {"available": True, "reason": "a store on this machine returned what was put into it"}


# --- nothing is left out ----------------------------------------------------------------------------------------------


def _first_party_backends() -> list[str]:
    return sorted(
        tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["eplb.backends"]
    )


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
    assert in_errors or re.search(rf":: eplb_core\.(?:\w+\.)?{name}$", pages, re.MULTILINE)


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
    assert all(marked(mark) for mark in ("run", "two-ranks", "exact", "try"))
