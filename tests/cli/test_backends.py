"""`eplb backends`, `eplb config explain` and the frame that every sub-command stands in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import eplb_core
from eplb_core.cli.checkout import with_local_commands
from eplb_core.cli.output import exit_code_of, one_line, write_json
from eplb_core.errors import (
    ConfigError,
    EplbError,
    HandshakeError,
    InputError,
    PlacementError,
    TransferError,
    UnknownBackendError,
)
from tests.support.fake_distributions import install, install_backend, run_eplb, run_python, spec_source

REPOSITORY = Path(__file__).parents[2]
_OPTIONS = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal
from eplb_core.contract.option_types import ByteSize, CommonOptions

@dataclass(frozen=True, slots=True, kw_only=True)
class Options(CommonOptions):
    window: ByteSize = field(default=ByteSize(2**20), metadata={"help": "staging [memory]"})
    mode: Literal["fast", "safe"] = "safe"
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with one backend of each kind of health."""
    install_backend(tmp_path, "rail", version="2.5", options="rail_options:Options")
    (tmp_path / "rail_options.py").write_text(_OPTIONS)
    source = "print('noise')\nraise RuntimeError('[red]bad')"
    install(tmp_path, "mid", backends={"mid": "mid_spec:BACKEND"}, modules={"mid_spec": source})
    install_backend(tmp_path, "needy", requires=("needy_driver",), install="pip install needy-driver")
    install_backend(tmp_path, "old", api="(0, 9)")
    install_backend(tmp_path, "twin", distribution="twin-a")
    install_backend(tmp_path, "twin", distribution="twin-b")
    return tmp_path


def document(*arguments: str, path: Path) -> dict[tuple[str, str], dict[str, object]]:
    done = run_eplb("backends", *arguments, "--json", "-", path=[path])
    assert done.returncode == 0, done.stderr
    return {(row["name"], row["distribution"]): row for row in json.loads(done.stdout)["backends"]}


def cells(table: str) -> list[list[str]]:
    """Return the cells of a printed table, without its head."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]


# --- eplb backends ---------------------------------------------------------------------------------------------------


def test_the_table_shows_each_backend_with_its_state_and_what_to_do(site: Path):
    done = run_eplb("backends", path=[site])
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row[1:] for row in cells(done.stdout)}
    assert rows["rail"] == ["rail-eplb", "2.5", "cpu", "", "ready", ""]
    assert rows["mid"][4] == "broken"
    assert rows["mid"][5].startswith(f"RuntimeError: [red]bad; {site}/mid_spec.py:2; pip install --upgrade mid")
    assert rows["needy"][4:] == ["not installed", "it needs the module needy_driver; pip install needy-driver"]
    assert rows["old"][4] == "incompatible"
    assert rows["twin"] == [
        "twin-b",
        "1.0",
        "cpu",
        "",
        "conflict",
        "twin-a and twin-b register this name; write twin@twin-b",
    ]


def test_the_json_document_says_the_same(site: Path):
    rows = document(path=site)
    states = {key: row["state"] for key, row in rows.items() if key[1] != "eplb"}
    assert states == {
        ("rail", "rail-eplb"): "ready",
        ("mid", "mid"): "broken",
        ("needy", "needy-eplb"): "not installed",
        ("old", "old-eplb"): "incompatible",
        ("twin", "twin-a"): "conflict",
        ("twin", "twin-b"): "conflict",
    }
    assert rows["rail", "rail-eplb"]["location"] == str(site)
    assert rows["rail", "rail-eplb"]["devices"] == ["cpu"]
    assert rows["rail", "rail-eplb"]["probe"] is None


def test_the_json_document_goes_to_a_file_beside_the_table(site: Path, tmp_path: Path):
    done = run_eplb("backends", "--json", str(tmp_path / "out.json"), path=[site])
    assert "rail" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["plugin_api"] == [1, 0]


def test_what_cannot_be_written_is_one_line_and_exit_2(tmp_path: Path):
    done = run_eplb("backends", "--json", str(tmp_path / "no" / "out.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: cannot write {tmp_path}/no/out.json: No such file or directory\n"


def test_neither_the_list_nor_the_help_imports_torch_or_a_backend(site: Path):
    for arguments in (["backends"], ["--help"]):
        loaded = run_python(
            f"""
            import sys
            from eplb_core.cli import main
            sys.stdout = sys.stderr
            main({arguments!r}, standalone_mode=False)
            answer = sorted(sys.modules)
            """,
            [site],
        )
        assert not {"torch", "numpy", "nixl", "rail_options", "fake_impl"} & set(loaded)


def test_a_probe_decides_whether_a_ready_backend_is_available(tmp_path: Path):
    probes = """
        import os
        from eplb_core.contract.backend import ProbeResult
        def good(device_type): return ProbeResult(True, f"moved bytes on {device_type}")
        def bad(device_type): return ProbeResult(False, "no fabric")
        def dies(device_type): os.abort()
        """
    names = ("good", "bad", "dies")
    modules = {f"{name}_spec": spec_source(name, probe=f"probes:{name}", requires=("probes",)) for name in names}
    install(
        tmp_path,
        "lab",
        backends={name: f"{name}_spec:BACKEND" for name in names},
        modules={**modules, "probes": probes},
    )
    install_backend(tmp_path, "absent", requires=("no_such_module",), probe="probes:dies")
    # eplb's own backends are probed too; what they answer here is not what this is about.
    rows = document("--probe", path=tmp_path)
    assert {name: (rows[name, "lab"]["state"], rows[name, "lab"]["probe"]["reason"]) for name in names} == {
        "good": ("ready", "moved bytes on cpu"),
        "bad": ("unavailable", "no fabric"),
        "dies": ("unavailable", "the probe was killed by SIGABRT"),
    }
    assert rows["absent", "absent-eplb"]["probe"] is None


def test_what_moves_tensors_of_an_absent_device_only_says_so(tmp_path: Path):
    install_backend(tmp_path, "rail")
    install(tmp_path, "plain", backends={"plain": "plain_spec:BACKEND"}, modules={"plain_spec": spec_source("plain")})
    source = spec_source("rail") + "import dataclasses\n"
    source += "BACKEND = dataclasses.replace(BACKEND, capabilities=Capabilities(device_types=('npu',)))\n"
    (tmp_path / "rail_eplb_spec.py").write_text(source)

    rows = document(path=tmp_path)

    assert rows["rail", "rail-eplb"]["state"] == "unavailable"
    assert rows["rail", "rail-eplb"]["why"] == "it moves npu tensors, and this machine has no such device"
    assert rows["plain", "plain"]["state"] == "ready"


def test_what_is_known_and_not_installed_is_listed_with_a_command_that_works_in_a_checkout():
    done = run_eplb("backends")
    for plugin in ("shm", "cuda-ipc", "mooncake"):
        name, folder = plugin.replace("-", "_"), REPOSITORY / "plugins" / f"eplb-{plugin}"
        if f"│ {name} " not in done.stdout:
            assert f"not installed: {name} (pip install -e '{folder}" in done.stdout


def test_a_probe_ends_with_what_auto_would_take(tmp_path: Path):
    probe = (
        "from eplb_core.contract.backend import ProbeResult\ndef good(device_type): return ProbeResult(True, 'yes')\n"
    )
    for name, priority in (("slow", 1000), ("fast", 2000)):
        install_backend(tmp_path, name, probe="probes:good", priority=priority)
    (tmp_path / "probes.py").write_text(probe)
    done = run_eplb("backends", "--probe", "--json", str(tmp_path / "out.json"), path=[tmp_path])
    assert "auto would take fast for cpu tensors" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["auto"] == "fast"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('pip install "eplb[plot]"', "pip install -e '{root}[plot]'"),
        ("pip install eplb-shm)", "pip install -e '{root}/plugins/eplb-shm')"),
        ('pip install "eplb-mooncake[cpu]"', "pip install -e '{root}/plugins/eplb-mooncake[cpu]'"),
        ("pip install eplb-acme", "pip install eplb-acme"),
        ("pip install --upgrade mid", "pip install --upgrade mid"),
    ],
)
def test_in_a_checkout_a_command_installs_from_it(text: str, said: str):
    assert with_local_commands(text, REPOSITORY) == said.format(root=REPOSITORY)


def test_a_wheel_has_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eplb_core, "__file__", str(tmp_path / "site-packages/eplb_core/__init__.py"))
    assert with_local_commands('pip install "eplb[plot]"') == 'pip install "eplb[plot]"'


def test_a_device_without_a_probe_is_a_usage_error():
    done = run_eplb("backends", "--device", "cpu")
    assert done.returncode == 2
    assert "--device needs --probe" in done.stderr


# --- eplb config explain ---------------------------------------------------------------------------------------------


def test_explain_shows_each_option_its_value_and_its_origin(site: Path):
    done = run_eplb(
        "config", "explain", "rail?window=64MiB", path=[site], environment={"EPLB_BACKEND__RAIL__TIMEOUT": "5s"}
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")
    ]
    assert [row[:3] for row in rows] == [
        ["timeout", "5s", "environment EPLB_BACKEND__RAIL__TIMEOUT"],
        ["start_timeout", "none", "default"],
        ["window", "64MiB", "config string"],
        ["mode", "safe", "default"],
    ]
    assert rows[2][3].startswith("staging [memory]; a size with a unit")
    assert done.stdout.splitlines()[0] == "rail: rail-eplb 2.5"
    assert done.stdout.splitlines()[-1] == "canonical: rail?timeout=5s&window=64MiB"


def test_explain_writes_json(site: Path):
    done = run_eplb("config", "explain", "rail?mode=fast", "--json", "-", path=[site])
    explained = json.loads(done.stdout)
    assert (explained["backend"], explained["canonical"]) == ("rail", "rail?mode=fast")
    assert {"key": "mode", "value": "fast", "origin": "config string", "help": "", "accepts": "one of fast, safe"} in (
        explained["options"]
    )


def test_explain_without_a_string_takes_the_environments(site: Path):
    done = run_eplb("config", "explain", path=[site], environment={"EPLB_BACKEND": "rail?mode=fast"})
    assert done.stdout.splitlines()[-1] == "canonical: rail?mode=fast"


def test_explain_takes_auto():
    done = run_eplb("config", "explain", "auto?timeout=5s")
    assert done.stdout.splitlines()[-1] == "canonical: auto?timeout=5s"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "rail?windw=1MiB",
            "error: backend 'rail' has no option 'windw', did you mean 'window'? (column 6 of 'rail?windw=1MiB'); "
            "hint: its options are: mode, start_timeout, timeout, window",
        ),
        (
            "rail?window",
            "error: option 'window' has no value (column 12 of 'rail?window'); hint: write window=...",
        ),
        (
            "needy",
            "error: backend 'needy' is not fully installed (needy-eplb 1.0): it needs the module needy_driver; "
            "hint: pip install needy-driver",
        ),
        (
            "twin",
            "error: 2 distributions register a backend 'twin' (twin-a 1.0, twin-b 1.0); "
            "hint: write twin@twin-a or twin@twin-b",
        ),
        ("shm", "error: backend 'shm' is not installed; hint: pip install eplb-shm"),
    ],
)
def test_what_cannot_be_explained_is_one_line_and_exit_2(site: Path, text: str, line: str):
    done = run_eplb("config", "explain", text, path=[site])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == with_local_commands(line) + "\n"


def test_nothing_to_explain_is_one_line_and_exit_2():
    done = run_eplb("config", "explain")
    assert done.returncode == 2
    assert done.stderr == "error: no config string to explain; hint: give one, or set EPLB_BACKEND\n"


# --- the frame -------------------------------------------------------------------------------------------------------


def test_an_unknown_command_is_refused_with_the_nearest():
    done = run_eplb("backnds")
    assert done.returncode == 2
    assert "There is no command 'backnds'. Did you mean backends" in done.stderr


def test_plugins_add_commands_and_their_errors_end_like_all_others(tmp_path: Path):
    source = """
        import click
        from eplb_core.errors import TransferError
        from eplb_core.hooks import hookimpl

        @click.command("weigh")
        def weigh():
            "Weigh the experts."
            raise TransferError("rank 3 is too heavy")

        @click.command("backends")
        def impostor():
            print("impostor")

        @hookimpl
        def eplb_cli_commands():
            return [weigh, impostor, "no command"]
        """
    install(tmp_path, "scales", plugins={"scales": "scales"}, modules={"scales": source})
    install(tmp_path, "bad", plugins={"bad": "bad"}, modules={"bad": "raise OSError('no disk')"})
    assert "weigh" in run_eplb("--help", path=[tmp_path]).stdout
    done = run_eplb("weigh", path=[tmp_path])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "warning: plugin bad@bad 1.0: OSError: no disk",
        "error: rank 3 is too heavy",
    ]
    assert "impostor" not in run_eplb("backends", path=[tmp_path]).stdout


def test_a_built_in_command_loads_no_plugin(tmp_path: Path):
    install(tmp_path, "bad", plugins={"bad": "bad"}, modules={"bad": "raise OSError('no disk')"})
    assert run_eplb("backends", path=[tmp_path]).stderr == ""


def test_a_pipe_gets_no_colour_and_long_lines_unbroken(site: Path):
    done = run_eplb("backends", path=[site], environment={"TERM": "xterm-256color"})
    assert "\x1b" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("│ mid")]) == 1


def test_no_color_is_respected_where_colour_is_forced(site: Path):
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[32mready" in run_eplb("backends", path=[site], environment=forced).stdout
    assert "\x1b[32m" not in run_eplb("backends", path=[site], environment={**forced, "NO_COLOR": "1"}).stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (ConfigError("x"), 2),
        (PlacementError("x"), 2),
        (UnknownBackendError("x", name="x"), 2),
        (TransferError("x"), 1),
        (HandshakeError("x", table={}), 1),
    ],
)
def test_what_the_user_has_to_change_is_exit_2_and_what_failed_is_exit_1(error: EplbError, code: int):
    assert exit_code_of(error) == code


def test_an_error_with_a_remedy_is_one_line():
    assert one_line(InputError("no loads", where="a.json", why="it is empty", remedy="record some")) == (
        "no loads (a.json): it is empty; hint: record some"
    )


def test_json_has_no_words_for_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"seconds": float("nan")}, str(tmp_path / "out.json"), "nothing/1")
    assert not (tmp_path / "out.json").exists()
