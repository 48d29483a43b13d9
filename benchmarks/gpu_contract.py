"""What holds with a GPU for each rank: the conformance kit, however the processes number their GPUs.

Each set of ranks is a command of its own, since what a process sees of the GPUs is settled by its environment. As a
command itself, this file connects the ranks and has every pair exchange random bytes:

    python benchmarks/gpu_contract.py nixl --ranks 2 --device cuda

It prints what was chosen and what each path is, or the error by which all ranks refused, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from findings import Row

from eplb_core.control.groups import TorchGroups
from eplb_core.errors import BackendUnavailableError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.bounded import Ended, run_bounded
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks
from eplb_core.launch.rank_devices import VISIBLE_GPUS_VARIABLE, device_group, rank_device
from eplb_core.transport.pattern import pattern

SEES = {"all": "every rank sees all GPUs", "own": "each sees its own", "own_first": "each sees its own first"}
"""What ranks see of the GPUs, as `EPLB_VISIBLE_GPUS` names it, and as a row says it."""

LOADS = Path(__file__).resolve().parent.parent / "examples" / "published-loads.json"

_SIZES = (1, 65_535, (8 << 20) + 3)
_POISON = 0xEE
_CONNECT_S = 60.0


@dataclass(frozen=True)
class Kit:
    """One run of the conformance kit: a backend, the number of ranks, and what they see of the GPUs."""

    backend: str
    ranks: int
    sees: str = "all"

    def __str__(self) -> str:
        """Return what its row is called."""
        return f"{self.backend}, {self.ranks} ranks, {SEES[self.sees]}"


def run_kit(kit: Kit, device: str, limit_s: float) -> Row:
    """Connect the ranks, then run the kit; ranks that refuse to connect, each with the same reason, are right too."""
    connected = _connect(kit.backend, kit.ranks, device, kit.sees, min(limit_s, _CONNECT_S))
    if "refused" in connected:
        return Row(part="contract", what=str(kit), remark=f"refused: {connected['refused']}", details=connected)
    command = ["-m", "eplb_core", "conformance", kit.backend, "--ranks", str(kit.ranks), "--device", device]
    command += ["--json", "-", *(["--register"] if "mode=direct" in kit.backend else [])]
    ended = _run(command, kit.sees, limit_s)
    counts, failed = _counts(ended)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    details = {"counts": counts, "failed": failed, "connected": connected, "seconds": ended.seconds}
    if ended.exit_code == 0 and counts.get("passed"):
        return Row(part="contract", what=str(kit), remark=told, details=details)
    reason = "; ".join(f"{name}: {detail.splitlines()[-1] if detail else ''}" for name, detail in failed.items())
    return Row(
        part="contract", what=str(kit), state="failed", reason=reason or ended.reason, remark=told, details=details
    )


def run_auto(ranks: int, device: str, sees: str, limit_s: float) -> Row:
    """Have `auto` choose, and the ranks exchange bytes over what it chose."""
    what = f"auto, {ranks} ranks, {SEES[sees]}"
    connected = _connect("auto", ranks, device, sees, limit_s)
    if "refused" in connected:
        return Row(part="contract", what=what, state="failed", reason=connected["refused"], details=connected)
    return Row(part="contract", what=what, remark=f"took {connected['config']}", details=connected)


def run_rebalance(ranks: int, device: str, sees: str, *, torchrun: bool, limit_s: float) -> Row:
    """Run `eplb rebalance --backend auto` on a checkpoint, with the weights on the GPUs."""
    how = "under torchrun" if torchrun else SEES[sees]
    what = f"eplb rebalance, {ranks} ranks, {how}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        made = _run(["-m", "eplb_core", "make-checkpoint", checkpoint, "--hidden", "512"], "all", limit_s)
        command = ["-m", "eplb_core", "rebalance", str(LOADS), "--checkpoint", checkpoint, "--json", f"{folder}/json"]
        slots = -12 % ranks
        command += ["--redundant", str(slots + ranks), "--backend", "auto", "--device", device, "--verify", "full"]
        if torchrun:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
        else:
            command += ["--ranks", str(ranks)]
        ended = made if made.exit_code else _run(command, sees, limit_s)
        written = Path(folder) / "json"
        found = json.loads(written.read_text()) if written.exists() else {}
    if ended.exit_code or not found.get("verified"):
        return Row(part="contract", what=what, state="failed", reason=ended.reason or "not verified", details=found)
    return Row(part="contract", what=what, remark=f"verified, over {found['backend']}", details=found)


def _run(command: list[str], sees: str, limit_s: float) -> Ended:
    return run_bounded([sys.executable, *command], limit_s, {**os.environ, VISIBLE_GPUS_VARIABLE: sees})


def _connect(backend: str, ranks: int, device: str, sees: str, limit_s: float) -> dict[str, Any]:
    """Return what this file prints; raises `RuntimeError` if it fails."""
    ended = _run([__file__, backend, "--ranks", str(ranks), "--device", device], sees, limit_s)
    if ended.exit_code != 0:
        raise RuntimeError(ended.reason)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _counts(ended: Ended) -> tuple[dict[str, int], dict[str, str]]:
    """Return how many checks ended how, and the details of those that failed."""
    try:
        document = json.loads(ended.stdout)
    except ValueError:
        return {}, {}
    wrong = ("failed", "not run")
    return document["counts"], {
        each["check"]: each["detail"] for each in document["results"] if each["status"] in wrong
    }


# --- as a command ----------------------------------------------------------------------------------------------------


def connect_and_exchange(environment: RankEnvironment, backend: str, kind: str) -> dict[str, Any]:
    """Run in each rank: connect, exchange random bytes with every other rank, and compare all of them."""
    device = rank_device(kind, environment)
    environment.init_process_group(_CONNECT_S)
    groups = TorchGroups(device_group=device_group(environment, device, _CONNECT_S))
    rank, others = environment.rank, [each for each in range(environment.world_size) if each != environment.rank]
    try:
        communicator = create_eplb_communicator(groups, backend, [torch.empty(0, device=device)])
    except BackendUnavailableError as error:
        return {"refused": str(error)}
    with communicator:
        landed = {}
        for nbytes in _SIZES:
            for other in others:
                sent = pattern(nbytes, device, rank, other)
                landed[other, nbytes] = torch.full((nbytes,), _POISON, dtype=torch.uint8, device=device)
                communicator.register([sent, landed[other, nbytes]])
                communicator.add_send(sent, other)
                communicator.add_recv(landed[other, nbytes], other)
        communicator.execute()
        for (other, nbytes), tensor in landed.items():
            if not torch.equal(tensor, pattern(nbytes, device, other, rank)):
                raise AssertionError(f"{nbytes} bytes from rank {other} arrived wrong")
        stats = communicator.last_stats
        paths = {} if stats is None else {str(peer): path for peer, path in stats.paths.items()}
        return {"config": communicator.binding.config, "paths": paths}


def main() -> int:
    """Connect the ranks of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", help="a config string")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    found = run_local_ranks(connect_and_exchange, given.ranks, (given.backend, given.device), timeout_s=_CONNECT_S)
    refused = [rank["refused"] for rank in found if "refused" in rank]
    if refused and len(refused) < len(found):
        print("some ranks refused, and others connected", file=sys.stderr)
        return 1
    first = found[0]
    print(json.dumps(first if refused else {**first, "paths": [rank["paths"] for rank in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
