"""The measurement of `eplb doctor`: each rank receives from every other one, checks the bytes, and takes the time.

It knows no backend: the path of the bytes comes from `last_stats.paths`, a backend's settings are the changes of the
environment, and its complaints are what it logs.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import TorchGroups
from eplb_core.control.plane import ControlPlane
from eplb_core.doctor.checks import Finding, Severity
from eplb_core.errors import EplbError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.launch.rank_devices import device_group, rank_device
from eplb_core.transport import HostIdentity
from eplb_core.transport.pattern import pattern
from eplb_core.words import ranks_text

_Value = TypeVar("_Value")

_TIMES = 3  # a link is judged by the fastest of these
_FLOOR_GBPS = {"cpu": 0.05, "cuda": 5.0}  # slower than this inside a host, something is wrong
_OUTLIER = 4  # a link is an outlier if it is this many times slower than the median of its kind
_POISON = 0xEE
_OWN_RATE = re.compile(r",? *(?:[\d.]+ [kMG]i?B/s|not measured yet)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_VERSION_CALLS = {"libucp": ("UCX", "ucp_get_version_string")}
"""Library that a backend may have loaded -> its name, and its function that returns the version."""


@dataclass(frozen=True, slots=True)
class LinkTest:
    """What to measure.

    Attributes:
        config: the config string.
        device: `cpu` or `cuda`.
        nbytes: of each message.
        timeout_s: the longest wait for the other ranks, in seconds.
    """

    config: str
    device: str
    nbytes: int
    timeout_s: float


@dataclass(slots=True)
class LinkReport:
    """The measurements of one backend by one rank.

    Attributes:
        rank: the rank.
        host: the name of its host.
        kernel: identifies the running kernel of its host.
        device: the device of its tensors.
        gbps: source rank -> GB/s (10^9 bytes) of the fastest transfer.
        paths: peer -> the path to it, in the backend's words.
        wrong: sources whose bytes were wrong.
        created_s: how long it took to make the communicator.
        environment: what the backend has set in this process.
        libraries: native library -> version, of those that the backend has loaded.
        warnings: what was logged as a warning or worse.
        error: why it failed, or an empty text.
    """

    rank: int
    host: str = field(default_factory=platform.node)
    kernel: str = ""
    device: str = ""
    gbps: dict[int, float] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)
    created_s: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str = ""


# --- on every rank ---------------------------------------------------------------------------------------------------


def measure_in_new_rank(environment: RankEnvironment, job: LinkTest) -> LinkReport:
    """Connect to the other ranks and measure; the target of a local process."""
    torch.set_num_threads(1)
    environment.init_process_group(job.timeout_s)
    control = ControlPlane(dist.PrefixStore("doctor", environment.store), environment.rank, environment.world_size)
    return measure_links(environment, open_groups(environment, job.device, job.timeout_s), control, job)


def open_groups(environment: RankEnvironment, device: str, timeout_s: float) -> TorchGroups:
    """Return groups of all ranks, with an NCCL group if each rank has a separate GPU."""
    own = rank_device(device, environment)
    return TorchGroups(device_group=device_group(environment, own, timeout_s))


def measure_links(
    environment: RankEnvironment, groups: TorchGroups, control: ControlPlane, job: LinkTest
) -> LinkReport:
    """Receive from every other rank, and return the report. Errors of this package become part of it.

    All ranks measure at once, each with a different peer, so that they share links as in a real transfer.
    """
    report = LinkReport(environment.rank, kernel=HostIdentity.here().boot or platform.node())
    device = rank_device(job.device, environment)
    report.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    before, loaded = dict(os.environ), _libraries()
    with _listening(report.warnings):
        try:
            began = time.monotonic()
            with create_eplb_communicator(groups, job.config, [torch.empty(0, device=device)]) as communicator:
                report.created_s = time.monotonic() - began
                report.libraries = {name: each for name, each in _libraries().items() if name not in loaded}
                _measure(communicator, control, job, device, report)
        except EplbError as error:
            report.error = f"{type(error).__name__}: {error}"
    report.environment = {name: value for name, value in os.environ.items() if before.get(name) != value}
    return report


def _measure(
    communicator: EplbCommunicator, control: ControlPlane, job: LinkTest, device: torch.device, report: LinkReport
) -> None:
    nbytes = min(job.nbytes, communicator.transfer_limit_bytes or job.nbytes) // 8 * 8
    source, landing = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    source.copy_(pattern(nbytes, device, control.rank))
    communicator.register([source])
    communicator.register([landing], landing=True)
    communicator.trust_matching(True)
    for distance in range(1, control.world_size):
        to, peer = (control.rank + distance) % control.world_size, (control.rank - distance) % control.world_size
        fastest = float("inf")
        for _ in range(_TIMES):
            landing.fill_(_POISON)
            communicator.add_send(source, to)
            communicator.add_recv(landing, peer)
            _synchronize(device)
            control.barrier("that every rank is ready to measure", job.timeout_s)
            began = time.perf_counter()
            communicator.execute()
            _synchronize(device)
            fastest = min(fastest, time.perf_counter() - began)
            if communicator.last_stats is not None:
                report.paths |= communicator.last_stats.paths
        report.gbps[peer] = nbytes / fastest / 1e9
        if not torch.equal(landing, pattern(nbytes, device, peer)):
            report.wrong.append(peer)
    control.barrier("that every rank has measured", job.timeout_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """Collect log records of all libraries, from warnings upwards."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(" ".join(record.getMessage().split()))

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(listener)


def _libraries() -> dict[str, str]:
    """Return the versions of the native libraries loaded into this process, as they report them."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        for path in sorted({line[line.index("/") :] for line in lines if ".so" in line and "/" in line}):
            stem = re.split(r"[-.]", Path(path).name)[0]
            if stem in _VERSION_CALLS:
                title, function = _VERSION_CALLS[stem]
                with contextlib.suppress(OSError, AttributeError):
                    ask = getattr(ctypes.CDLL(path), function)
                    ask.restype = ctypes.c_char_p
                    found[title] = ask().decode(errors="replace")
    return found


# --- what it means ---------------------------------------------------------------------------------------------------


def path_of(text: str) -> str:
    """Return a path without the rate that a backend may have included."""
    return _OWN_RATE.sub("", text).strip(" ,") or "the backend does not say"


def judge(config: str, device: str, reports: Sequence[LinkReport]) -> list[Finding]:
    """Return problems and warnings; nothing if all links are as they should be."""
    findings: list[Finding] = []
    for error, ranks in _grouped((report.error, report.rank) for report in reports if report.error).items():
        findings.append(Finding(config, Severity.PROBLEM, f"{ranks_text(ranks)}: {' '.join(error.split())}"))
    for report in reports:
        if report.wrong:
            detail = f"rank {report.rank} received wrong bytes from {ranks_text(report.wrong)}"
            findings.append(Finding(config, Severity.PROBLEM, detail, "do not use this transport here"))
    findings += _slow(config, device, reports)
    heard = _grouped((_NUMBER.sub("#", text), text) for report in reports for text in report.warnings)
    for alike in heard.values():
        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
        findings.append(Finding(config, Severity.WARNING, f"{alike[0]}{more}"))
    return findings


def _slow(config: str, device: str, reports: Sequence[LinkReport]) -> list[Finding]:
    """Return warnings about links inside a host that are slow or use tcp."""
    kernel_of = {report.rank: report.kernel for report in reports}
    inside = {
        (peer, report.rank): rate
        for report in reports
        for peer, rate in report.gbps.items()
        if kernel_of.get(peer) == report.kernel
    }
    if not inside:
        return []
    findings = []
    median = statistics.median(inside.values())
    floor = max(_FLOOR_GBPS.get(device, 0.0), median / _OUTLIER)
    slow = [pair for pair, rate in inside.items() if rate < floor]
    if slow:
        rates = [inside[pair] for pair in slow]
        findings.append(
            Finding(
                config,
                Severity.WARNING,
                f"{_pairs(slow)} of one host: {min(rates):.3g} to {max(rates):.3g} GB/s; the median is {median:.3g}",
                "see whether the machine is busy, and compare with another backend",
            )
        )
    paths = {(report.rank, peer): text for report in reports for peer, text in report.paths.items()}
    over_tcp = [(peer, rank) for (rank, peer), text in paths.items() if (peer, rank) in inside and "over tcp" in text]
    if over_tcp:
        detail = f"{_pairs(over_tcp)} of one host go over tcp: {path_of(paths[over_tcp[0][::-1]])}"
        remedy = "let ranks of one host share memory: one PID namespace, and no variable that leaves only tcp"
        findings.append(Finding(config, Severity.WARNING, detail, remedy))
    return findings


def _grouped(pairs: Iterable[tuple[str, _Value]]) -> Mapping[str, list[_Value]]:
    groups: dict[str, list[_Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    some = ", ".join(f"{source} to {destination}" for source, destination in sorted(pairs)[:4])
    return f"{len(pairs)} links ({some}{', ...' if len(pairs) > 4 else ''})"
