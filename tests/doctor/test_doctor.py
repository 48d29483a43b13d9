"""`eplb doctor`: what it says of the machine, of the links, of what plugins check, and with which exit code."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eplb_core.doctor import Finding, Severity
from eplb_core.doctor import machine as doctor_machine
from eplb_core.doctor.checks import run_checks, worst
from eplb_core.doctor.links import LinkReport, judge, path_of
from eplb_core.doctor.machine import Machine, look_at_machine, variables_that_matter
from tests.support.fake_distributions import install, install_backend, run_child, run_eplb

# --- checks of plugins -----------------------------------------------------------------------------------------------

GOOD, BAD = Finding("switch"), Finding("firmware", Severity.PROBLEM, "too old", "update it")


def test_a_check_returns_a_finding_several_or_nothing() -> None:
    def all_is_well() -> None: ...

    findings = run_checks([lambda: GOOD, lambda: iter((BAD, GOOD)), all_is_well], 10.0)
    assert findings == [GOOD, BAD, GOOD, Finding("all is well")]


def exits() -> None:
    raise SystemExit(3)


def raises() -> None:
    raise ValueError("no\nsuch switch")


def returns_a_text() -> str:
    return "fine"


def returns_a_number_among_findings() -> list[object]:
    return [GOOD, 3]


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (exits, "SystemExit: 3"),
        (raises, "ValueError: no such switch"),
        (returns_a_text, "returned str where a Finding is expected"),
        (returns_a_number_among_findings, "returned int where a Finding is expected"),
    ],
)
def test_a_check_that_fails_is_a_warning_and_the_next_one_runs(check: Any, said: str) -> None:
    failed, after = run_checks([check, lambda: GOOD], 10.0)
    assert (failed.name, failed.severity) == (check.__name__.replace("_", " "), Severity.WARNING)
    assert said in failed.detail
    assert after == GOOD


def test_a_check_that_hangs_is_left_behind() -> None:
    ended = threading.Event()
    hanging, after = run_checks([ended.wait, lambda: GOOD], 0.05)
    ended.set()
    assert "did not end within 0.05 s" in hanging.detail
    assert after == GOOD


def test_the_verdict_is_the_worst_finding() -> None:
    warning = Finding("disk", Severity.WARNING)
    assert [worst(each) for each in ([], [GOOD], [GOOD, warning], [BAD, warning])] == [
        Severity.OK,
        Severity.OK,
        Severity.WARNING,
        Severity.PROBLEM,
    ]


# --- the machine -----------------------------------------------------------------------------------------------------


def test_variables_of_torch_the_transports_and_the_needed_modules_are_shown() -> None:
    environment = {"UCX_TLS": "tcp", "ACME_RAILS": "4", "HOME": "/", "PYTORCH_ALLOC_CONF": "x", "ACMENOT": "1"}
    assert variables_that_matter(environment, ["acme"]) == {
        "ACME_RAILS": "4",
        "PYTORCH_ALLOC_CONF": "x",
        "UCX_TLS": "tcp",
    }


def test_versions_of_the_distributions_behind_the_needed_modules_are_facts() -> None:
    facts = look_at_machine(["pluggy", "torch", "no_such_module"]).facts
    assert set(facts) >= {"eplb", "Python", "torch", "pluggy", "kernel", "CPU", "/dev/shm", "locked memory"}
    assert "no_such_module" not in facts


def warnings_of_machine() -> dict[str, Finding]:
    return {finding.name: finding for finding in look_at_machine([]).findings}


def test_a_small_shared_memory_is_warned_of_with_the_container_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor_machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20, total=64 << 20)
    )
    assert "--shm-size" in warnings_of_machine()["/dev/shm"].remedy


@pytest.mark.parametrize(("scope", "warns"), [("0", False), ("1", False), ("2", True), ("3", True)])
def test_a_ptrace_scope_that_keeps_ranks_from_one_anothers_memory_is_warned_of(
    scope: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scope").write_text(f"{scope}\n")
    monkeypatch.setattr(doctor_machine, "_PTRACE_SCOPE", tmp_path / "scope")
    monkeypatch.setattr(doctor_machine, "_can_read_memory", lambda: True)
    assert ("reading other processes" in warnings_of_machine()) == warns


def test_a_filter_on_reading_other_processes_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_can_read_memory", lambda: False)
    assert "SYS_PTRACE" in warnings_of_machine()["reading other processes"].remedy


def test_limited_locked_memory_matters_where_there_is_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    monkeypatch.setattr(doctor_machine, "_RDMA_DEVICES", tmp_path)
    assert "locked memory" not in warnings_of_machine()
    (tmp_path / "mlx5_0").mkdir()
    assert "8192 KiB" in warnings_of_machine()["locked memory"].detail


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("value", "warns"),
    [
        ("expandable_segments:True", True),
        ("max_split_size_mb:64, expandable_segments:true", True),
        ("expandable_segments:False", False),
        ("", False),
    ],
)
def test_expandable_segments_are_warned_of(name: str, value: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert ("device allocator" in warnings_of_machine()) == warns


# --- links -----------------------------------------------------------------------------------------------------------


def reports(rates: dict[tuple[int, int], float], path: str = "rail", **more: Any) -> list[LinkReport]:
    """Return reports of ranks on one host; `rates` are by source and destination."""
    found = {rank: LinkReport(rank, kernel="one") for pair in rates for rank in pair}
    for (source, destination), rate in rates.items():
        found[destination].gbps[source] = rate
        found[destination].paths[source] = path
    return [found[rank] for rank in sorted(found)]


FINE = {(a, b): 5.0 for a in range(3) for b in range(3) if a != b}


def test_links_that_are_alike_and_fast_need_no_word() -> None:
    assert judge("acme", "cpu", reports(FINE)) == []


def test_a_link_far_below_the_others_of_its_host_is_named() -> None:
    [finding] = judge("acme", "cpu", reports(FINE | {(2, 0): 1.0}))
    assert finding.severity is Severity.WARNING
    assert "1 links (2 to 0)" in finding.detail


@pytest.mark.parametrize(("device", "warns"), [("cpu", 0), ("cuda", 1)])
def test_what_is_slow_depends_on_the_device(device: str, warns: int) -> None:
    assert len(judge("acme", device, reports({(0, 1): 1.0, (1, 0): 1.0}))) == warns


def test_slow_links_between_hosts_are_not_judged() -> None:
    near, far = reports({(0, 1): 0.001, (1, 0): 0.001}, path="tcp")
    far.kernel = "another"
    assert judge("acme", "cpu", [near, far]) == []


def test_tcp_inside_a_host_is_warned_of_with_the_way_that_the_backend_told() -> None:
    [finding] = judge("acme", "cpu", reports(FINE, path="ACME, over tcp,self, 1.25 GB/s"))
    assert "6 links (0 to 1, 0 to 2, 1 to 0, 1 to 2, ...)" in finding.detail
    assert finding.detail.endswith("ACME, over tcp,self")
    assert finding.remedy


def test_wrong_bytes_and_errors_are_problems() -> None:
    first, second, third = reports(FINE)
    first.wrong = [2]
    second.error = third.error = "PeerLostError: rank 0\nis gone"
    found = judge("acme", "cpu", [first, second, third])
    assert {finding.severity for finding in found} == {Severity.PROBLEM}
    assert [finding.detail for finding in found] == [
        "ranks 1, 2: PeerLostError: rank 0 is gone",
        "rank 0 received wrong bytes from rank 2",
    ]


def test_warnings_that_differ_only_in_numbers_are_told_once() -> None:
    found = reports(FINE)
    for rank, report in enumerate(found):
        report.warnings = [f"the link from rank {rank} gives 0.{rank} GB/s"]
    [finding] = judge("acme", "cpu", found)
    assert finding.detail == "the link from rank 0 gives 0.0 GB/s (and 2 more like it)"


@pytest.mark.parametrize(
    ("told", "path"),
    [
        ("UCX, same host, 5.31 GB/s", "UCX, same host"),
        ("UCX, same host, not measured yet", "UCX, same host"),
        ("gloo", "gloo"),
        ("", "the backend does not say"),
    ],
)
def test_a_path_is_told_without_the_backends_own_rate(told: str, path: str) -> None:
    assert path_of(told) == path


# --- the command -----------------------------------------------------------------------------------------------------

_PLUGIN = """
from eplb_core.doctor import Finding, Severity
from eplb_core.hooks import hookimpl

def broken():
    raise RuntimeError("the switch did not answer")

def firmware():
    return Finding("firmware", Severity.WARNING, "version 3 of 4", "update it")

@hookimpl
def eplb_doctor_checks():
    return [broken, firmware]
"""
_FAILING = """
from eplb_core.errors import TransferError
def create(context, options, weights):
    raise TransferError("no rail is up", phase="connect")
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """The exit code, the document and the text of one call, with three backends that are asked for."""
    site = install_backend(tmp_path_factory.mktemp("site"), "rail", factory="rail_impl:create")
    (site / "rail_impl.py").write_text(_FAILING)
    install(site, "acme-doctor", plugins={"acme": "acme_doctor"}, modules={"acme_doctor": _PLUGIN})
    asked = ("nixl?window=32MiB", "rail", "nosuch")
    arguments = (*asked, "--device", "cpu", "--size", "1MiB", "--json", "told.json")
    done = run_eplb("doctor", *arguments, path=[site], environment={"UCX_TLS": "tcp,self"})
    assert (site / "told.json").exists(), done.stderr
    return done.returncode, json.loads((site / "told.json").read_text()), done.stdout


def findings_of(document: dict[str, Any], name: str) -> list[dict[str, str]]:
    return [finding for finding in document["findings"] if finding["name"] == name]


def test_a_backend_that_does_not_work_is_a_problem_and_the_others_are_measured(
    told: tuple[int, dict[str, Any], str],
) -> None:
    code, document, _ = told
    assert (code, document["verdict"]) == (1, "problem")
    assert "there is no backend 'nosuch'" in findings_of(document, "nosuch")[0]["detail"]
    assert "no rail is up" in findings_of(document, "rail")[0]["detail"]
    assert [sorted(report["gbps"]) for report in document["links"]["nixl?window=32MiB"]] == [["1"], ["0"]]


def test_every_link_is_shown_with_its_rate_and_its_way(told: tuple[int, dict[str, Any], str]) -> None:
    _, document, text = told
    assert all(rate > 0 for report in document["links"]["nixl?window=32MiB"] for rate in report["gbps"].values())
    assert "nixl?window=32MiB: GB/s from the rank on the left to the rank above" in text
    assert "a  UCX, same host, over tcp,self" in text


def test_tcp_on_one_host_is_warned_of_by_the_doctor_and_by_the_backend(told: tuple[int, dict[str, Any], str]) -> None:
    details = [finding["detail"] for finding in findings_of(told[1], "nixl?window=32MiB")]
    assert any("of one host go over tcp" in detail for detail in details)
    assert any("UCX_TLS=tcp,self allows only the network; unset it" in detail for detail in details)


def test_what_the_user_set_and_what_the_backend_set_are_told_apart(told: tuple[int, dict[str, Any], str]) -> None:
    _, document, text = told
    assert document["machines"][0]["environment"]["UCX_TLS"] == "tcp,self"
    for report in document["links"]["nixl?window=32MiB"]:
        assert report["environment"] == {"NIXL_LOG_LEVEL": "WARN", "UCX_DEBUG_SIGNO": "0"}
        assert "UCX" in report["libraries"]
    assert "set: NIXL_LOG_LEVEL=WARN, UCX_DEBUG_SIGNO=0" in text


def test_checks_of_plugins_are_heard_around_one_that_fails(told: tuple[int, dict[str, Any], str]) -> None:
    _, document, text = told
    assert findings_of(document, "broken")[0]["detail"] == "the check failed: RuntimeError: the switch did not answer"
    assert findings_of(document, "firmware")[0]["severity"] == "warning"
    assert "hint: update it" in text


def test_an_option_that_the_backend_does_not_know_is_a_usage_error() -> None:
    done = run_eplb("doctor", "nixl?windw=1MiB")
    assert done.returncode == 2
    assert "did you mean 'window'?" in done.stderr


def test_what_a_rank_found_survives_the_way_to_rank_0() -> None:
    machine = look_at_machine(["torch", "pluggy"])
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine
    for report in reports(FINE):
        assert msgspec.json.decode(msgspec.json.encode(report), type=LinkReport) == report


@pytest.mark.nightly
def test_under_torchrun_it_joins_the_ranks_and_rank_0_tells(tmp_path: Path) -> None:
    starter = tmp_path / "eplb.py"
    starter.write_text("from eplb_core.cli import main\nmain()\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(starter)]
    asked = ["doctor", "torch_gloo", "--device", "cpu", "--size", "1MiB", "--json", "told.json"]
    done = run_child([*torchrun, *asked], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "told.json").read_text())
    assert [report["paths"] for report in document["links"]["torch_gloo"]] == [{"1": "gloo"}, {"0": "gloo"}]
    assert len(document["machines"]) == 1
    assert done.stdout.count("torch_gloo: GB/s") == 1
