"""Finding and selecting backends, on distributions that are really there, in a child process for each question."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eplb_core.contract.backend import Capabilities
from eplb_core.registry import probe
from eplb_core.registry.discovery import discover
from tests.support.fake_distributions import install, install_backend, run_child, run_python, spec_source

_INSTALLED = sorted({each.distribution for each in discover("eplb.backends")})
_LIST = f"""
from eplb_core.registry.registry import Registry
answer = [
    [e.name, e.distribution, e.version, str(e.state), e.why, e.remedy, e.file, list(e.notes)]
    for e in Registry().entries() if e.distribution not in {_INSTALLED}
]
"""
_KEYS = ("name", "distribution", "version", "state", "why", "remedy", "file", "notes")


def listed(*path: Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return what a registry in a child lists, without what is installed beside these tests."""
    rows = run_python(_LIST, path, cwd=cwd, environment=environment)
    return [dict(zip(_KEYS, row, strict=True)) for row in rows]


def refusal(text: str, *path: Path, call: str = "registry.select(parse_config(text))") -> tuple[str, str]:
    """Return the class and the whole text of the error that a child gets for a config string."""
    kind, message = run_python(
        f"""
        from eplb_core.registry.config import parse_config
        from eplb_core.errors import EplbError
        from eplb_core.registry.registry import Registry, load_factory, load_options_class, load_probe
        text, registry = {text!r}, Registry()
        try:
            {call}
            answer = ["nothing was raised", ""]
        except EplbError as error:
            answer = [type(error).__name__, str(error)]
        """,
        path,
    )
    return kind, message


def selected(text: str, *path: Path) -> list[str]:
    """Return name, distribution and version of what a config string selects in a child."""
    chosen: list[str] = run_python(
        f"""
        from eplb_core.registry.config import parse_config
        from eplb_core.registry.registry import Registry
        entry = Registry().select(parse_config({text!r}))
        answer = [entry.name, entry.distribution, entry.version, str(entry.state)]
        """,
        path,
    )
    return chosen


# --- what is listed --------------------------------------------------------------------------------------------------


def test_an_installed_backend_is_listed_with_where_it_comes_from(tmp_path: Path):
    install_backend(tmp_path, "rail", version="2.5")
    assert listed(tmp_path) == [
        {
            "name": "rail",
            "distribution": "rail-eplb",
            "version": "2.5",
            "state": "ready",
            "why": "",
            "remedy": "",
            "file": "",
            "notes": [],
        }
    ]


def test_a_hyphen_in_an_entry_points_name_is_an_underscore(tmp_path: Path):
    install(
        tmp_path, "dash", backends={"two-rails": "dash_spec:BACKEND"}, modules={"dash_spec": spec_source("two_rails")}
    )
    assert selected("two-rails", tmp_path)[0] == "two_rails"


def test_the_list_is_sorted_however_the_folders_lie(tmp_path: Path):
    for folder, name in (("c", "zeta"), ("a", "mid"), ("b", "alpha")):
        install_backend(tmp_path / folder, name)
    path = [tmp_path / "c", tmp_path / "a", tmp_path / "b"]
    names = [row["name"] for row in listed(*path)]
    assert names == ["alpha", "mid", "zeta"]
    assert listed(*reversed(path)) == listed(*path)


def test_listing_imports_no_backend_and_no_torch_and_nothing_that_a_backend_needs(tmp_path: Path):
    install_backend(tmp_path, "rail", requires=("rail_driver",), probe="rail_impl:probe", options="rail_impl:Options")
    for module in ("rail_impl", "rail_driver", "fake_impl"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')\n")
    loaded = run_python(
        """
        import sys
        from eplb_core.registry.registry import Registry
        states = {entry.name: str(entry.state) for entry in Registry().entries()}
        assert states["rail"] == "ready", states
        answer = sorted({name.partition(".")[0] for name in sys.modules})
        """,
        [tmp_path],
    )
    assert not {"torch", "numpy", "nixl", "click", "rail_impl", "rail_driver", "fake_impl"} & set(loaded)
    assert "rail_eplb_spec" in loaded


def test_importing_the_package_imports_neither_torch_nor_numpy_nor_click_nor_any_metadata():
    loaded = run_python("import sys, eplb_core\nanswer = sorted(sys.modules)")
    assert not {"torch", "numpy", "click", "pluggy", "importlib_metadata", "rich"} & set(loaded)


def test_selecting_imports_only_the_specs_of_that_name(tmp_path: Path):
    install_backend(tmp_path, "rail")
    install(
        tmp_path, "other", backends={"other": "other_spec:BACKEND"}, modules={"other_spec": "import os; os._exit(3)"}
    )
    assert selected("rail", tmp_path) == ["rail", "rail-eplb", "1.0", "ready"]


# --- broken plugins --------------------------------------------------------------------------------------------------


def test_a_plugin_that_raises_at_import_does_not_break_those_around_it(tmp_path: Path):
    install_backend(tmp_path, "aaa")
    install(
        tmp_path,
        "mid-eplb",
        version="0.3",
        backends={"mid": "mid_spec:BACKEND"},
        modules={"mid_spec": "x = 1\nraise RuntimeError('driver too old')\n"},
    )
    install_backend(tmp_path, "zzz")
    rows = {row["name"]: row for row in listed(tmp_path)}
    assert {name: row["state"] for name, row in rows.items()} == {"aaa": "ready", "mid": "broken", "zzz": "ready"}
    assert rows["mid"]["why"] == "RuntimeError: driver too old"
    assert selected("zzz", tmp_path)[0] == "zzz"
    assert refusal("mid", tmp_path) == (
        "BackendBrokenError",
        f"backend 'mid' is broken (mid-eplb 0.3, {tmp_path}/mid_spec.py:2): RuntimeError: driver too old\n"
        "  hint: pip install --upgrade mid-eplb, or pip uninstall mid-eplb",
    )


@pytest.mark.parametrize(
    ("source", "why", "line"),
    [
        ("import sys\nsys.exit('no licence')\n", "SystemExit: no licence", 2),
        ("import librail_missing\n", "ModuleNotFoundError: No module named 'librail_missing'", 1),
        ("BACKEND = (\n", "SyntaxError: '(' was never closed (mid_spec.py, line 1)", 1),
    ],
)
def test_the_file_and_the_cause_of_a_failing_import_are_told(tmp_path: Path, source: str, why: str, line: int):
    install(tmp_path, "mid", backends={"mid": "mid_spec:BACKEND"}, modules={"mid_spec": source})
    (row,) = listed(tmp_path)
    assert (row["state"], row["why"], row["file"]) == ("broken", why, f"{tmp_path}/mid_spec.py:{line}")


@pytest.mark.parametrize(
    ("value", "source", "why"),
    [
        ("gone:BACKEND", "", "ModuleNotFoundError: No module named 'gone'"),
        ("mid_spec:NOPE", "", "AttributeError: module 'mid_spec' has no attribute 'NOPE'"),
        ("mid_spec:BACKEND", "BACKEND = 'mid'", "it registers str where a BackendSpec is expected"),
        ("not a reference", "", "its entry point is 'not a reference' where 'module:attribute' is expected"),
        ("mid_spec:BACKEND", spec_source("other"), "its spec is named 'other', but its entry point is named 'mid'"),
        (
            "mid_spec:BACKEND",
            spec_source("mid", api="'1.0'"),
            "its api_version is '1.0' where two whole numbers are expected",
        ),
        (
            "mid_spec:BACKEND",
            spec_source("mid", factory="create"),
            "its factory is 'create' where 'module:attribute' is expected",
        ),
        (
            "mid_spec:BACKEND",
            spec_source("mid", requires="torch"),
            "its requires is 'torch' where a tuple of module names is expected",
        ),
    ],
)
def test_what_is_registered_has_to_be_a_spec_of_that_name(tmp_path: Path, value: str, source: str, why: str):
    install(tmp_path, "mid", backends={"mid": value}, modules={"mid_spec": source})
    (row,) = listed(tmp_path)
    assert (row["state"], row["why"]) == ("broken", why)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("auto", "the name 'auto' is reserved"),
        ("Rail", "its name 'Rail' is invalid: 'R' is not a lower-case letter, a digit, '_' or '-'"),
    ],
)
def test_a_name_that_no_config_string_can_mean_is_listed_as_broken(tmp_path: Path, name: str, why: str):
    install(tmp_path, "bad", backends={name: "bad_spec:BACKEND"}, modules={"bad_spec": spec_source(name)})
    (row,) = listed(tmp_path)
    assert (row["name"], row["state"], row["why"]) == (name, "broken", why)


def test_one_distribution_with_one_name_twice_is_broken(tmp_path: Path):
    install(tmp_path, "twice", backends={"a-b": "s:ONE", "a_b": "s:TWO"}, modules={"s": ""})
    (row,) = listed(tmp_path)
    assert (row["state"], row["why"]) == ("broken", "it registers a_b twice, as s:ONE and as s:TWO")


def test_metadata_that_cannot_be_read_is_skipped_with_a_warning(tmp_path: Path):
    install_backend(tmp_path, "rail")
    broken = tmp_path / "junk-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: junk\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_bytes(b"[eplb.backends]\n\xff\xfe = x:y\n")
    child = run_child(["-c", _LIST + "\nprint(answer)"], [tmp_path])
    assert "'rail'" in child.stdout
    assert f"skipped the metadata of a distribution in {tmp_path}" in child.stderr


# --- two with one name -----------------------------------------------------------------------------------------------


def test_two_distributions_with_one_name_are_a_conflict_only_when_that_name_is_selected(tmp_path: Path):
    install_backend(tmp_path, "rail", distribution="acme-eplb")
    install_backend(tmp_path, "rail", distribution="other-eplb", version="2.0")
    install_backend(tmp_path, "solo")
    assert [(row["name"], row["state"], row["remedy"]) for row in listed(tmp_path)] == [
        ("rail", "conflict", "write rail@acme-eplb"),
        ("rail", "conflict", "write rail@other-eplb"),
        ("solo", "ready", ""),
    ]
    assert selected("solo", tmp_path)[3] == "ready"
    assert refusal("rail", tmp_path) == (
        "BackendConflictError",
        "2 distributions register a backend 'rail' (acme-eplb 1.0, other-eplb 2.0)\n"
        "  hint: write rail@acme-eplb or rail@other-eplb",
    )


def test_naming_the_distribution_settles_a_conflict(tmp_path: Path):
    install_backend(tmp_path, "rail", distribution="acme-eplb")
    install_backend(tmp_path, "rail", distribution="other-eplb", version="2.0")
    assert selected("rail@other_EPLB", tmp_path) == ["rail", "other-eplb", "2.0", "ready"]


def test_naming_a_distribution_that_does_not_register_the_backend_is_refused_with_those_that_do(tmp_path: Path):
    install_backend(tmp_path, "rail", distribution="acme-eplb")
    assert refusal("rail@beta", tmp_path) == (
        "UnknownBackendError",
        "distribution 'beta' registers no backend 'rail'\n  hint: write rail@acme-eplb",
    )


def test_a_broken_rival_is_a_conflict_too_and_never_silently_left_out(tmp_path: Path):
    install_backend(tmp_path, "rail", distribution="acme-eplb")
    install(tmp_path, "bad", backends={"rail": "gone:BACKEND"})
    assert refusal("rail", tmp_path)[0] == "BackendConflictError"
    assert selected("rail@acme-eplb", tmp_path)[1] == "acme-eplb"


def test_two_distributions_that_register_the_very_same_object_are_no_conflict(tmp_path: Path):
    install_backend(tmp_path, "rail", distribution="acme-eplb")
    install(tmp_path, "bundle", backends={"rail": "acme_eplb_spec:BACKEND"})
    assert [(row["distribution"], row["state"]) for row in listed(tmp_path)] == [("acme-eplb", "ready")]
    assert selected("rail", tmp_path)[1] == "acme-eplb"
    assert selected("rail@bundle", tmp_path)[1] == "bundle"


# --- copies and places -----------------------------------------------------------------------------------------------


def test_of_two_copies_of_a_distribution_the_first_on_the_path_wins_and_the_other_is_reported(tmp_path: Path):
    old = install_backend(tmp_path / "old", "rail", version="0.9")
    new = install_backend(tmp_path / "new", "rail", version="1.2")
    assert [(row["version"], row["notes"]) for row in listed(old, new)] == [
        ("0.9", [f"another copy, 1.2 in {new}, is ignored"])
    ]
    assert selected("rail", new, old)[2] == "1.2"


def test_a_stale_copy_without_the_backend_hides_the_later_one_as_it_does_for_import(tmp_path: Path):
    stale = install(tmp_path / "stale", "rail-eplb", version="0.1")
    fresh = install_backend(tmp_path / "fresh", "rail", version="1.2")
    (row,) = listed(stale, fresh)
    assert (row["version"], row["state"]) == ("1.2", "broken")
    assert row["why"] == f"0.1 in {stale} comes earlier on the path and does not register it"


def test_of_two_metadata_folders_side_by_side_the_newer_counts(tmp_path: Path):
    install_backend(tmp_path, "rail", version="1.9")
    (tmp_path / "rail_eplb_spec.py").unlink()
    install_backend(tmp_path, "rail", version="1.10")
    assert [row["version"] for row in listed(tmp_path)] == ["1.10"]


def test_a_folder_that_is_on_the_path_twice_counts_once(tmp_path: Path):
    folder = install_backend(tmp_path / "site", "rail")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert [(row["state"], row["notes"]) for row in listed(folder, link, folder)] == [("ready", [])]


@pytest.mark.parametrize("metadata", ["dist-info", "egg-info"])
@pytest.mark.parametrize("start", [["-c"], ["-m", "listing"], ["listing.py"]], ids=["-c", "-m", "script"])
def test_metadata_lying_in_the_current_directory_is_not_installed(tmp_path: Path, metadata: str, start: list[str]):
    source = "from eplb_core.registry.registry import Registry\nprint([e.name for e in Registry().entries()])"
    install(
        tmp_path,
        "rail",
        backends={"rail": "rail_spec:BACKEND"},
        modules={"rail_spec": spec_source("rail"), "listing": source},
        metadata=metadata,
    )
    child = run_child([*start, source] if start == ["-c"] else start, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert "rail" not in child.stdout
    assert "torch_gloo" in child.stdout


def test_the_current_directory_counts_where_pythonpath_names_it(tmp_path: Path):
    install_backend(tmp_path, "rail")
    assert [row["name"] for row in listed(tmp_path, cwd=tmp_path)] == ["rail"]


def test_the_current_directory_counts_where_it_stands_behind_the_standard_library(tmp_path: Path):
    install_backend(tmp_path, "rail")
    names = run_python(
        """
        import os, sys
        sys.path.append(os.getcwd())  # where a .pth file puts a source tree
        from eplb_core.registry.registry import Registry
        answer = Registry().names()
        """,
        cwd=tmp_path,
    )
    assert "rail" in names


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_and_all_that_are_installed(tmp_path: Path):
    install_backend(tmp_path, "rail")
    kind, message = refusal("rial", tmp_path)
    names = run_python("from eplb_core.registry.registry import Registry\nanswer = Registry().names()", [tmp_path])
    assert kind == "UnknownBackendError"
    assert message == (
        "there is no backend 'rial', did you mean 'rail'?\n"
        f"  hint: choose one that is installed: {', '.join(names)}; see `eplb backends`"
    )


def test_a_name_is_never_taken_for_something_to_import(tmp_path: Path):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    assert refusal("evil", tmp_path)[0] == "UnknownBackendError"


@pytest.mark.parametrize(("name", "command"), [("shm", "pip install eplb-shm")])
def test_a_backend_that_is_known_but_not_installed_is_refused_with_the_command(name: str, command: str):
    code = """
    from eplb_core.registry.config import parse_config
    from eplb_core.errors import EplbError
    from eplb_core.registry.registry import Registry
    try:
        Registry("eplb.backends.of-nobody").select(parse_config({name!r}))
    except EplbError as error:
        answer = [type(error).__name__, str(error)]
    """
    folded = name.replace("-", "_")
    assert run_python(code.replace("{name!r}", repr(name))) == [
        "BackendNotInstalledError",
        f"backend '{folded}' is not installed\n  hint: {command}",
    ]


def test_a_missing_extra_is_refused_with_the_command_that_installs_it(tmp_path: Path):
    requires = ("json", "rail_driver", "rail_a|rail_b")
    install_backend(tmp_path, "rail", requires=requires, install='pip install "rail-eplb[driver]"')
    assert listed(tmp_path)[0]["state"] == "not installed"
    assert refusal("rail", tmp_path) == (
        "BackendNotInstalledError",
        "backend 'rail' is not fully installed (rail-eplb 1.0): it needs the module rail_driver and rail_a or rail_b\n"
        '  hint: pip install "rail-eplb[driver]"',
    )


def test_one_of_several_alternatives_is_enough(tmp_path: Path):
    install_backend(tmp_path, "rail", requires=("rail_a|rail_b",))
    (tmp_path / "rail_b.py").write_text("raise RuntimeError('imported')\n")
    assert selected("rail", tmp_path)[3] == "ready"


# --- loading the rest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "part", "why"),
    [
        ("load_factory", "factory fake_impl:create", "AttributeError: module 'fake_impl' has no attribute 'create'"),
        ("load_options_class", "options class fake_impl:Options", "TypeError: Options is not a dataclass"),
        ("load_probe", "probe fake_impl:PROBE", "TypeError: int is not callable"),
    ],
)
def test_a_part_that_cannot_be_loaded_is_told_with_its_name_and_cause(tmp_path: Path, call: str, part: str, why: str):
    install_backend(tmp_path, "rail", options="fake_impl:Options", probe="fake_impl:PROBE")
    (tmp_path / "fake_impl.py").write_text("class Options: pass\nPROBE = 3\n")
    assert refusal("rail", tmp_path, call=f"{call}(registry.select(parse_config(text)))") == (
        "BackendBrokenError",
        f"the {part} of backend 'rail' is broken (rail-eplb 1.0, {tmp_path}): {why}\n"
        "  hint: pip install --upgrade rail-eplb, or pip uninstall rail-eplb",
    )


def test_the_cause_of_a_failing_import_is_kept(tmp_path: Path):
    install_backend(tmp_path, "rail")
    (tmp_path / "fake_impl.py").write_text("1 / 0\n")
    cause, place = run_python(
        """
        from eplb_core.registry.config import parse_config
        from eplb_core.errors import BackendBrokenError
        from eplb_core.registry.registry import Registry, load_factory
        try:
            load_factory(Registry().select(parse_config("rail")))
        except BackendBrokenError as error:
            answer = [type(error.__cause__).__name__, error.where]
        """,
        [tmp_path],
    )
    assert cause == "ZeroDivisionError"
    assert place == f"rail-eplb 1.0, {tmp_path}/fake_impl.py:1"


def test_a_backend_without_a_probe_has_none(tmp_path: Path):
    install_backend(tmp_path, "rail")
    assert run_python(
        """
        from eplb_core.registry.config import parse_config
        from eplb_core.registry.registry import Registry, load_probe
        answer = [load_probe(Registry().select(parse_config("rail")))]
        """,
        [tmp_path],
    ) == [None]


# --- probes ----------------------------------------------------------------------------------------------------------


def probed(
    tmp_path: Path, body: str, *, device: str = "cpu", timeout_s: float = 30.0, before: str = "", **spec: object
) -> list[Any]:
    """Return the answer of a probe with this body, run by a child of a child; `before` is run on import."""
    install_backend(tmp_path, "rail", probe="rail_probe:probe", **spec)
    source = f"import os, signal, subprocess, sys, time\nfrom eplb_core.contract.backend import ProbeResult\n{before}\n"
    source += "def probe(device_type):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    (tmp_path / "rail_probe.py").write_text(source)
    answer: list[Any] = run_python(
        f"""
        from eplb_core.registry.config import parse_config
        from eplb_core.registry.probe import run_probe
        from eplb_core.registry.registry import Registry
        result = run_probe(Registry().select(parse_config("rail")), {device!r}, timeout_s={timeout_s})
        answer = [result.available, result.reason, *filter(None, [result.warning])]
        """,
        [tmp_path],
        environment={"RANK": "3", "MASTER_ADDR": "nowhere"},
    )
    return answer


def test_a_probes_answer_is_passed_on(tmp_path: Path):
    body = "return ProbeResult(True, f'moved 4 KiB of {device_type}')"
    assert probed(tmp_path, body) == [True, "moved 4 KiB of cpu"]


ON_CUDA = Capabilities(device_types=("cuda",))


@pytest.mark.parametrize(("device", "current"), [("cuda:3", [3]), ("cuda", [])])
def test_the_device_that_is_asked_for_is_the_current_one_of_the_probe(
    tmp_path: Path, device: str, current: list[int]
) -> None:
    before = "import torch\nchosen = []\ntorch.cuda.set_device = chosen.append"
    body = "return ProbeResult(True, f'{device_type} {chosen}')"
    answer = probed(tmp_path, body, device=device, before=before, capabilities=ON_CUDA)
    assert answer == [True, f"cuda {current}"]


def test_what_a_probe_prints_does_not_disturb_its_answer(tmp_path: Path):
    body = "print('{}')\nos.write(1, b'native noise')\nreturn ProbeResult(False, 'no fabric')"
    assert probed(tmp_path, body) == [False, "no fabric"]


def test_a_probe_does_not_see_the_job_that_it_is_run_in(tmp_path: Path):
    body = "return ProbeResult('RANK' not in os.environ and 'MASTER_ADDR' not in os.environ, 'alone')"
    assert probed(tmp_path, body) == [True, "alone"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise OSError('no such device')", "OSError: no such device"),
        ("return True", "the probe rail_probe:probe returned bool instead of a ProbeResult"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the probe was killed by SIGSEGV"),
        ("print('half way', file=sys.stderr); os._exit(7)", "the probe exited with code 7 and no answer: half way"),
    ],
)
def test_a_probe_that_fails_or_dies_makes_the_backend_unavailable_and_says_how(tmp_path: Path, body: str, reason: str):
    assert probed(tmp_path, body) == [False, reason]


def test_a_crash_at_the_exit_of_a_probe_that_works_is_a_warning(tmp_path: Path):
    """As a library whose destructor crashes: whoever uses the backend ends likewise."""
    crash = "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGSEGV)"
    body = f"{crash}\nreturn ProbeResult(True, 'bytes are right')"
    assert probed(tmp_path, body) == [
        True,
        "bytes are right",
        "a process that used it was killed by SIGSEGV at exit",
    ]


def test_what_a_probe_warns_of_is_kept(tmp_path: Path):
    body = "return ProbeResult(True, 'bytes are right', warning='over\\ntcp')"
    assert probed(tmp_path, body) == [True, "bytes are right", "over tcp"]


def test_a_probe_that_hangs_is_ended_with_all_its_children(tmp_path: Path):
    body = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert probed(tmp_path, body, timeout_s=1.0) == [False, "the probe did not end within 1 s"]
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


NO_PIDFD = """
import os
def forbidden(*arguments):
    raise PermissionError(1, "Operation not permitted")
os.pidfd_open = forbidden
"""


@pytest.mark.parametrize(
    ("body", "timeout_s", "answer"),
    [
        ("return ProbeResult(True, 'bytes are right')", 30.0, [True, "bytes are right"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 30.0, [False, "the probe was killed by SIGSEGV"]),
        ("time.sleep(600)", 1.0, [False, "the probe did not end within 1 s"]),
    ],
)
def test_probes_run_where_an_old_container_runtime_forbids_pidfd_open(
    tmp_path: Path, body: str, timeout_s: float, answer: list[Any]
):
    (tmp_path / "sitecustomize.py").write_text(NO_PIDFD)
    assert probed(tmp_path, body, timeout_s=timeout_s) == answer


def test_a_path_in_sys_path_that_is_no_text_is_taken_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "lib", 3])
    assert str(tmp_path / "lib") in probe._child_environment()["PYTHONPATH"].split(os.pathsep)


def test_a_device_that_the_backend_does_not_declare_is_not_probed(tmp_path: Path):
    assert probed(tmp_path, "os._exit(1)", device="cuda") == [False, "it does not move cuda tensors"]


# --- eplb's own backends ---------------------------------------------------------------------------------------------


def test_the_first_party_backends_come_through_the_same_door():
    registered = run_python(
        """
        from eplb_core.registry.registry import Registry
        answer = [[entry.name, entry.distribution] for entry in Registry().entries()]
        """
    )
    assert ["torch_gloo", "eplb"] in registered
    assert ["torch_nccl", "eplb"] in registered
