#!/usr/bin/env python3
"""Test and measure on a machine with several GPUs, one rank on each; print one table and write one JSON file.

    python benchmarks/many_gpus.py --json many-gpus.json

runs unattended and ends within --limit seconds. Its parts, which --only selects:

    link       the rate at which torch copies from one GPU to the next, which all else is compared with
    tests      tests/multigpu: under torchrun, with a rank that is killed, and with orders of streams removed
    contract   the conformance kit of every backend, each also where a rank sees its own GPU alone, and where it sees
               it first; ranks that share GPUs in part; what `auto` takes; `eplb rebalance` with weights on the GPUs
    backends   every backend for GPUs, on six workloads, every byte compared in the end: three in which all slots are
               drawn anew, and 58 layers of small experts in which nothing moves, or 1 or 20 pairs of experts
    peers      vLLM's own transfer code on the same workloads (--vllm, a folder that compare.py makes), but for those
               in which next to nothing moves
    inference  matrix products on every GPU, with and without a rearrangement in the background

Each part has a share of the time, and what it leaves goes to those after it; a row that finds its share used up is
run at the end, if time is left then. What fails or hangs becomes a row that says why, and the rest still runs. With
--device cpu all of it is a rehearsal, in small: its figures mean nothing.
Exit code 0 if nothing failed and every byte that we moved was right, 1 if not, 2 if the machine does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from beside_inference import Plan, measure, summarize
from compare import VLLM, Contestant, run
from findings import Findings, Row, State
from gpu_contract import SEES, Kit, run_auto, run_kit, run_rebalance
from gpu_tests import FILES, run_tests
from link_rate import Copies, Link, measure_link
from rich.console import Console
from workload_sizes import MOST_SWAPS, SIZES, Size

from eplb_core.bench.rank import BenchRun
from eplb_core.bench.run import check_job, run_bench
from eplb_core.bench.workload import Workload
from eplb_core.cli.output import one_line
from eplb_core.errors import BackendNotInstalledError, EplbError, UnknownBackendError
from eplb_core.launch.bounded import descendants, run_bounded
from eplb_core.launch.local_ranks import LocalRankError, run_local_ranks
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import default_registry

PARTS = {"link": 1.0, "tests": 7.0, "contract": 17.0, "backends": 18.0, "peers": 9.0, "inference": 6.0}
"""What is run, and its share of the time."""

BACKENDS = {
    "cuda": ("nixl?mode=packed", "nixl?mode=direct", "torch_nccl", "pynccl", "cuda_ipc"),
    "cpu": ("torch_gloo", "nixl?mode=packed", "nixl?mode=direct"),
}
THIRD_PARTY = ("cuda_ipc",)  # not registered unless a distribution of its own is installed
PEERS = {"cuda": ("nixl", "nccl"), "cpu": ("nixl", "gloo")}

MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Nothing here uses NVLink multicast; some hosts do not stand it."""

_RUN_S, _LEAST_S = 60.0, 3.0  # the longest that one run may take, and the least that it is started with
_GRACE_S = 15.0  # after --limit, until everything is ended by force
_MEMORY_SHARE = 0.85

COPIES = {"cuda": (256 << 20, 20), "cpu": (8 << 20, 4)}  # bytes of a copy, copies of a sample
BESIDE_S = {"cuda": 3.0, "cpu": 0.2}  # of each measurement beside inference


class Campaign:
    """One run of this script.

    Args:
        given: the command line.
        findings: takes the rows.
    """

    def __init__(self, given: argparse.Namespace, findings: Findings) -> None:
        self.device: str = given.device
        self.ranks: int = given.ranks
        self.vllm: Path = given.vllm
        self.pace_share: float = given.pace_share
        self.backends: Sequence[str] = given.backends or (*BACKENDS[given.device], *given.also)
        self.optional = () if given.backends else BACKENDS[given.device]
        self.sizes = [size for size in SIZES[given.device] if not given.workloads or size.name in given.workloads]
        self.findings = findings
        self.links: list[Link] = []
        self.end = time.monotonic() + given.limit
        self.part, self.part_end = "", self.end
        self.hung: set[tuple[str, str]] = set()
        self.postponed: list[tuple[str, str, str, Callable[[float], Row | None]]] = []
        self.last_call = False
        self.folder = tempfile.TemporaryDirectory(prefix="eplb-many-gpus-")

    def perform(self, parts: Sequence[str]) -> None:
        """Run the parts, each within its share of what is left, and then what found its share used up."""
        for number, part in enumerate(parts):
            now = time.monotonic()
            share = PARTS[part] / sum(PARTS[later] for later in parts[number:])
            self.part, self.part_end = part, now + share * max(self.end - now, 0.0)
            self.row(part, "", getattr(self, f"run_{part}"))
        self.last_call, self.part_end = True, self.end
        for part, what, workload, work in self.postponed:
            self.part = part
            self.row(what, workload, work)

    def row(self, what: str, workload: str, work: Callable[[float], Row | None]) -> None:
        """Add what `work` returns, or that it failed. It is given the seconds that it may take.

        What would not be started for want of time is postponed to the end, once.
        """
        left = min(self.part_end - time.monotonic(), _RUN_S if workload else float("inf"))
        reason = ""
        if (self.part, what) in self.hung:
            reason = "not run again: it did not end in time before"
        elif left < _LEAST_S:
            if not self.last_call:
                self.postponed.append((self.part, what, workload, work))
                return
            reason = "not run: the time is used up"
        if reason:
            self.add(Row(part=self.part, what=what, workload=workload, state="failed", reason=reason))
            return
        try:
            found = work(left)
        except Exception as error:  # noqa: BLE001 - whatever it was becomes a row, and the rest still runs
            reason = reason_of(error)
            if "did not end within" in reason:
                self.hung.add((self.part, what))
            # Some backends learn only in the ranks that what they need is not there.
            missing = what in self.optional and f"with {BackendNotInstalledError.__name__}" in reason
            found = Row(
                part=self.part,
                what=what,
                workload=workload,
                state="skipped" if missing else "failed",
                reason=reason,
                details={"error": str(error)},
            )
        if found is not None:
            self.add(found)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.findings.add(row)

    # --- the parts --------------------------------------------------------------------------------------------------

    def run_link(self, limit_s: float) -> None:
        """Measure what the links can do."""
        nbytes, count = COPIES[self.device]
        copies = Copies(self.device, nbytes, count, limit_s)
        self.links = run_local_ranks(measure_link, self.ranks, (copies,), timeout_s=limit_s)
        self.findings.head["links"] = [asdict(link) for link in self.links]
        alone = statistics.median(link.alone_gb_per_s for link in self.links)
        together = statistics.median(link.together_gb_per_s for link in self.links)
        routed = all(len(link.reaches) == self.ranks - 1 for link in self.links)
        how = "memcpy" if self.device == "cpu" else "peer access" if routed else "NO peer access between some GPUs"
        for what, rate in (("one copies", alone), ("all copy", together)):
            good = all(link.correct for link in self.links)
            reason = "" if good else "the copies hold other bytes"
            remark = f"{how}, {self.links[0].name}"
            state: State = "ok" if good else "wrong"
            self.add(Row(part="link", what=what, state=state, reason=reason, gb_per_s=rate, remark=remark))

    def run_tests(self, limit_s: float) -> None:
        """Run the tests for several GPUs, all files at a time: nothing is measured."""
        with ThreadPoolExecutor(len(FILES)) as several:
            for file in FILES:
                several.submit(self.row, file.name, "", partial(run_tests, file, self.device, self.ranks))

    def run_contract(self, limit_s: float) -> None:
        """Run the conformance kit of every backend, and the commands, several at a time: nothing is measured."""
        sees = tuple(SEES) if self.device == "cuda" else ("all",)
        works: dict[str, Callable[[], Row]] = {}
        for backend in self.backends:
            for each in sees:
                kit = Kit(backend, self.ranks, each)
                works[str(kit)] = partial(self.kit, kit, limit_s)
            if self.device == "cuda" and "nccl" not in backend:  # NCCL takes no two ranks on one GPU
                kit = Kit(backend, self.ranks + 1)
                works[str(kit)] = partial(self.kit, kit, limit_s)
        for each in sees:
            works[f"auto {each}"] = partial(run_auto, self.ranks, self.device, each, limit_s)
            rebalance = partial(run_rebalance, self.ranks, self.device, limit_s=limit_s)
            works[f"rebalance {each}"] = partial(rebalance, each, torchrun=False)
        works["rebalance torchrun"] = partial(rebalance, "all", torchrun=True)
        with ThreadPoolExecutor(max(1, (psutil.cpu_count() or 1) // (2 * self.ranks))) as several:
            for what, work in works.items():
                several.submit(self.row, what, "", lambda _, work=work: work())

    def run_backends(self, _: float) -> None:
        """Run every backend on every workload."""
        for size in self.sizes:
            work = size.workload(self.ranks)
            for backend in self.backends:
                self.row(backend, size.name, partial(self.backend, backend, size, work))

    def run_peers(self, _: float) -> None:
        """Run vLLM's transfer code on every workload but the smallest: it goes through all layers in any case."""
        if not (self.vllm / "vllm/distributed/eplb/rebalance_execute.py").is_file():
            reason = f"{self.vllm} holds no vLLM: benchmarks/compare.py makes that folder; copy it here, or give --vllm"
            self.add(Row(part="peers", what=f"vLLM {VLLM}", state="skipped", reason=reason))
            return
        for number, size in enumerate(size for size in self.sizes if size.swaps in (None, MOST_SWAPS)):
            work, path = size.workload(self.ranks), Path(self.folder.name) / f"{number}.npz"
            np.savez(path, placements=work.placements, tensor_bytes=work.tensor_bytes, ranks=self.ranks)
            for name in PEERS[self.device]:
                peer = Contestant(f"vLLM {name}", False, name, "")
                self.row(peer.name, size.name, partial(self.peer, peer, size, path, work))

    def run_inference(self, _: float) -> None:
        """Run every backend that may run in the background beside matrix products."""
        size = next((size for size in self.sizes if size.swaps != 0), None)
        if size is None:
            reason = "nothing moves in the workloads that were chosen"
            self.add(Row(part="inference", what="all backends", state="skipped", reason=reason))
            return
        work = size.workload(self.ranks)
        for backend in self.backends:
            self.row(backend, size.name, partial(self.beside, backend, size, work))

    # --- one measurement --------------------------------------------------------------------------------------------

    def kit(self, kit: Kit, limit_s: float) -> Row:
        """Run the conformance kit once."""
        return self.missing(kit.backend, str(kit)) or run_kit(kit, self.device, limit_s)

    def backend(self, backend: str, size: Size, work: Workload, limit_s: float) -> Row:
        """Run one backend on one workload."""
        unfit = self.unfit(backend, size, work)
        if unfit is not None:
            return unfit
        job = BenchRun(workload=work, backend=backend, device=self.device, timeout_s=limit_s)
        check_job(job)
        found = run_bench(job)
        devices = set(found["devices"])
        if self.device == "cuda" and len(devices) != self.ranks:
            reason = f"the ranks share GPUs: {', '.join(found['devices'])}"
            return Row(part=self.part, what=backend, workload=size.name, state="failed", reason=reason)
        # The rates that backends found at their start differ from link to link; they are in the details.
        paths = {re.sub(r", [\d.]+ GB/s$", "", path) for peers in found["paths"].values() for path in peers.values()}
        return self.moved(backend, size, found, "; ".join(sorted(paths)))

    def peer(self, peer: Contestant, size: Size, path: Path, work: Workload, limit_s: float) -> Row:
        """Run vLLM's code on one workload. Beside the weights it needs a whole layer."""
        unfit = self.unfit(peer.name, size, work, more=work.rank_bytes // work.num_layers)
        if unfit is not None:
            return unfit
        found = run(peer, path, self.vllm, self.device, limit_s)
        if "error" in found:
            raise RuntimeError(found["error"])
        return self.moved(peer.name, size, found, f"vLLM {VLLM}")

    def moved(self, what: str, size: Size, found: dict[str, Any], remark: str) -> Row:
        """Return the row of a rearrangement that came to its end."""
        rate = float(found["gb_per_s"]) / self.ranks if found["bytes_moved"] else None
        return Row(
            part=self.part,
            what=what,
            workload=size.name,
            ours=self.part != "peers",
            state="ok" if found["correct"] else "wrong",
            reason="" if found["correct"] else f"{found['wrong_tensors']} tensors hold wrong bytes",
            seconds=float(found["seconds_median"]),
            gb_per_s=rate,
            link_share=self.link_share(rate),
            remark=remark,
            details=found,
        )

    def beside(self, backend: str, size: Size, work: Workload, limit_s: float) -> Row | None:
        """Run one backend beside matrix products, with and without a pace."""
        unfit = self.unfit(backend, size, work)
        if unfit is not None:
            return unfit
        entry = default_registry().select(parse_config(backend))
        if entry.spec is not None and not entry.spec.capabilities.background:
            reason = "it cannot run beside inference, as it declares itself"
            return Row(part=self.part, what=backend, workload=size.name, state="skipped", reason=reason)
        plan = Plan(work, backend, self.device, BESIDE_S[self.device], self.pace_share, limit_s)
        found = run_local_ranks(measure, self.ranks, (plan,), timeout_s=limit_s)
        wrong = sum(rank.wrong for rank in found)
        for paced in (False, True):
            costs = summarize(found, paced)
            pace = f"pace {costs['pace'] / 1e9:,.2f} GB/s" if paced else "no pace"
            p99, own = costs["slowdown_p99"], costs["engine_share"]
            remark = f"{pace}; 99th percentile {p99:+.0%}; start, commit and wait {own:.0%} of {costs['jobs']} jobs"
            self.add(
                Row(
                    part=self.part,
                    what=backend + (" paced" if paced else ""),
                    workload=size.name,
                    state="wrong" if wrong else "ok",
                    reason=f"{wrong} tensors hold wrong bytes" if wrong else "",
                    seconds=costs["batch_s"],
                    gb_per_s=costs["gb_per_s"],
                    link_share=self.link_share(costs["gb_per_s"]),
                    slowdown=costs["slowdown"],
                    remark=remark,
                    details=costs | {"wrong_tensors": wrong},
                )
            )
        return None

    # --- what they have in common -----------------------------------------------------------------------------------

    def unfit(self, what: str, size: Size, work: Workload, more: int = 0) -> Row | None:
        """Return a row if it cannot be run here at all: it is not installed, or the GPUs are too small."""
        missing = None if what.startswith("vLLM") else self.missing(what, what, size.name)
        if missing is not None:
            return missing
        reason = ""
        free = min((link.free_bytes for link in self.links if link.memory_bytes), default=0)
        needed = work.rank_bytes + more
        if free and needed > _MEMORY_SHARE * free:
            reason = f"it needs {needed / 1e9:.0f} GB on each GPU, and {free / 1e9:.0f} GB are free"
        if not reason:
            return None
        return Row(part=self.part, what=what, workload=size.name, state="skipped", reason=reason)

    def missing(self, backend: str, what: str, workload: str = "") -> Row | None:
        """Return a row if a backend that need not be here is not installed."""
        try:
            default_registry().select(parse_config(backend))
        except (BackendNotInstalledError, UnknownBackendError) as error:
            known = isinstance(error, BackendNotInstalledError) or backend in THIRD_PARTY
            if backend not in self.optional or not known:
                raise
            return Row(part=self.part, what=what, workload=workload, state="skipped", reason=one_line(error))
        return None

    def link_share(self, gb_per_s: float | None) -> float | None:
        """Return what a rate of one GPU is of the rate at which each copies from the next."""
        if not self.links or gb_per_s is None:
            return None
        return gb_per_s / statistics.median(link.together_gb_per_s for link in self.links)


def reason_of(error: Exception) -> str:
    """Return an error in a line; of a rank's traceback the last one."""
    if isinstance(error, LocalRankError):
        last = [line for line in (error.why or "").splitlines() if line.strip()][-1:]
        return ": ".join([error.what, *last])
    return one_line(error) if isinstance(error, EplbError) else f"{type(error).__name__}: {error}"


def machine() -> dict[str, object]:
    """Return what this runs on; no CUDA context is made."""
    versions = {"python": platform.python_version()}
    for name in ("eplb", "torch", "nixl", "nccl4py", "eplb-cuda-ipc", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, object] = {"platform": platform.platform(), "cpus": psutil.cpu_count(), "versions": versions}
    for name, command in (("gpus", ["nvidia-smi", "-L"]), ("topology", ["nvidia-smi", "topo", "-m"])):
        try:
            found[name] = run_bounded(command, 20).stdout.splitlines()
        except OSError:
            found[name] = []
    return found


def end_by_force(findings: Findings, limit_s: float) -> None:
    """Write what there is, kill all processes that were started, and this one."""
    row = Row(part="all", what="", state="failed", reason=f"did not end within {limit_s:g} s; all was ended by force")
    findings.rows.append(row)
    findings.write(finished=False)
    print(row.reason, file=sys.stderr, flush=True)
    for process in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(1)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, checked against the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, help="one on each GPU  [default: all GPUs, or 2 on the CPU]")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    names = [size.name for size in SIZES["cuda"]]
    parser.add_argument("--workloads", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--backends", nargs="+", metavar="CONFIG", help="instead of all that this script knows")
    parser.add_argument("--also", nargs="+", default=[], metavar="CONFIG", help="further ones")
    parser.add_argument("--pace-share", type=float, default=0.25, help="of the rate without a pace  [default: 0.25]")
    cache = Path.home() / ".cache" / "eplb-bench" / f"vllm-{VLLM}"
    parser.add_argument("--vllm", type=Path, default=cache, help="an unzipped wheel of vLLM")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it  [default: 540]")
    parser.add_argument("--json", type=Path, help="write all numbers here, after every row")
    given = parser.parse_args(arguments)
    gpus = torch.cuda.device_count() if given.device == "cuda" else 0
    given.ranks = given.ranks or (gpus if given.device == "cuda" else 2)
    if given.device == "cuda" and gpus < max(given.ranks, 2):
        parser.error(f"{max(given.ranks, 2)} ranks take as many GPUs, and torch sees {gpus}; --device cpu rehearses")
    if given.ranks < 2:
        parser.error("it takes 2 ranks at least")
    if given.json and not given.json.resolve().parent.is_dir():
        parser.error(f"the folder of {given.json} does not exist")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign."""
    given = parse_arguments(arguments)
    os.environ.update(MULTICAST_OFF)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    findings = Findings(given.json, console, {"device": given.device, "ranks": given.ranks, "limit_s": given.limit})
    watchdog = threading.Timer(given.limit + _GRACE_S, end_by_force, (findings, given.limit + _GRACE_S))
    watchdog.daemon = True
    watchdog.start()
    try:
        campaign = Campaign(given, findings)
        findings.head["machine"] = machine()
        campaign.perform([part for part in PARTS if part in given.only])
    finally:
        watchdog.cancel()
        findings.write(finished=True)
    what = "rehearsal on the CPU; the figures mean nothing" if given.device == "cpu" else "one rank on each GPU"
    findings.print_table(f"{given.ranks} ranks, {what}")
    return 0 if findings.good else 1


if __name__ == "__main__":
    sys.exit(main())
