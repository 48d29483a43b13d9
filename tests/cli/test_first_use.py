"""The first minutes with the command: its version, what it says without its extra, completion, and the demo."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import eplb_core
from eplb_core.cli import main
from eplb_core.cli.demo import LOADS
from eplb_core.extras import EXTRAS
from tests.support.fake_distributions import install_backend, run_child, run_eplb

REPOSITORY = Path(__file__).parents[2]
_HIDE = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hidden!r} else find_spec(name, package)
for name in {hidden!r}:
    sys.modules[name] = None
"""


def test_the_version_comes_first_then_what_it_runs_with_and_what_is_plugged_in(tmp_path: Path) -> None:
    install_backend(tmp_path, "rail", distribution="rail-eplb", version="2.5")

    done = run_eplb("--version", path=[tmp_path])

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == f"eplb {eplb_core.__version__}"
    assert f"torch {version('torch')}" in lines
    assert f"click {version('click')}" in lines
    assert "rail-eplb 2.5 (backends: rail)" in lines


def test_the_version_is_told_without_importing_torch() -> None:
    code = "import sys\nfrom eplb_core.cli.version import version_text\nversion_text()\nprint('torch' in sys.modules)"
    assert run_child(["-c", code]).stdout == "False\n"


@pytest.mark.parametrize("hidden", [EXTRAS["cli"], ("safetensors",)], ids=["all", "one"])
def test_without_its_extra_the_command_says_what_to_install_in_one_line(hidden: tuple[str, ...]) -> None:
    code = _HIDE.format(hidden=set(hidden)) + "from eplb_core.__main__ import main\nmain()"

    done = run_child(["-c", code])

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the eplb command needs " + ", ".join(hidden))
    assert 'pip install "eplb[cli]"' in line


def test_what_an_engine_imports_needs_nothing_of_the_extra() -> None:
    code = _HIDE.format(hidden=set(EXTRAS["cli"])) + (
        "import eplb_core, eplb_core.hooks, eplb_core.testing, eplb_core.doctor\n"
        "import eplb_core.transport, eplb_core.policies\n"
        "for name in eplb_core.__all__: getattr(eplb_core, name)\n"
        "from eplb_core.registry.registry import default_registry, load_options_class\n"
        "for entry in default_registry().entries():\n"
        "    if entry.spec and entry.distribution == 'eplb': load_options_class(entry)\n"
    )

    done = run_child(["-c", code])

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_the_command(shell: str) -> None:
    done = run_eplb("completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"_EPLB_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("eplb reb", {"rebalance"}),
        ("eplb rebalance --backend torch_g", {"torch_gloo"}),
        ("eplb rebalance --policy deep", {"deepseek"}),
        ("eplb rebalance --model mix", {"mixtral-8x7b"}),
        ("eplb bench --backend rai", {"rail"}),
        ("eplb doctor aut", {"auto"}),
        ("eplb conformance --check a_group_of_one", {"a_group_of_one_rank_has_nothing_to_move"}),
    ],
)
def test_names_are_completed_also_those_of_installed_backends(
    words: str, completions: set[str], tmp_path: Path
) -> None:
    install_backend(tmp_path, "rail")
    environment = {
        "_EPLB_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }

    done = run_eplb(path=[tmp_path], environment=environment)

    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == completions


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rebalance"], "error: Missing argument 'LOADS'"),
        (["--foo"], "error: No such option '--foo'"),
        (["demo", "--rank", "3"], "error: No such option '--rank'"),
        (["make-checkpoint", "x", "--style", "y"], "error: Invalid value for '--style'"),
    ],
)
def test_an_error_in_the_command_line_is_one_line_and_exit_2(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, arguments, prog_name="eplb")
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(said.rstrip("'"))
    assert f"see eplb{' ' + arguments[0] if arguments[0][0] != '-' else ''} --help" in line


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_demo_moves_its_own_experts_and_leaves_nothing_behind(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    done = CliRunner().invoke(main, ["demo", "--backend=torch_gloo", f"--ranks={ranks}", "--json=-"])

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    assert not list(tmp_path.glob("eplb-demo-*"))


def test_the_line_that_the_demo_shows_does_the_same_with_what_it_keeps(tmp_path: Path) -> None:
    demo = ["demo", "--backend=torch_gloo", "--ranks=2", f"--keep={tmp_path}"]
    shown = CliRunner().invoke(main, demo).stdout.splitlines()[0]

    done = CliRunner().invoke(main, shown.removeprefix("$ eplb ").split())

    assert done.exit_code == 0, done.stderr
    assert "verified" in done.stdout


def test_the_demo_refuses_more_ranks_than_it_has_experts() -> None:
    done = CliRunner().invoke(main, ["demo", "--ranks=13"])
    assert (done.exit_code, done.stderr.splitlines()) == (
        2,
        ["error: --ranks is 13: the demo has 12 experts; give 1 to 12 ranks"],
    )


def test_the_demo_has_the_published_loads_of_the_examples() -> None:
    published = json.loads((REPOSITORY / "examples/published-loads.json").read_text())["loads"]
    assert [list(layer) for layer in LOADS] == published
