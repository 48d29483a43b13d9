"""From creation to the end of the process: closing, and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.errors import CommunicatorClosedError
from eplb_core.testing.check import Check, Place, expect, raised_by, skip
from eplb_core.testing.context import RankContext
from eplb_core.testing.traffic import exchange, ring

_CYCLES = 4
_HALF = _CYCLES // 2
_WARM_UP = 1  # whatever is loaded, or allocated once, is there after this
_TRANSFERS = 5  # in each cycle
_SETTLE_S = 2.0  # threads and kernel objects may go a moment after close() returned
_GROWTH_BYTES = 16 << 20  # allocators keep some memory; cycles that leak a window are far above this
_SHARED_MEMORY = Path("/dev/shm")


def closing_returns(context: RankContext) -> None:
    """close() returns, and raises nothing when every rank closes."""
    _ = context.closed_communicator


def closing_twice_is_fine(context: RankContext) -> None:
    """close() may be called again."""
    context.closed_communicator.close()


def a_closed_communicator_refuses_everything_else(context: RankContext) -> None:
    """After close(), every other call raises CommunicatorClosedError."""
    communicator = context.closed_communicator
    peer = (context.rank + 1) % context.world_size
    tensor = torch.zeros(64, device=context.device)
    raised_by(lambda: communicator.add_send(tensor, peer), CommunicatorClosedError)
    raised_by(lambda: communicator.add_recv(tensor, peer), CommunicatorClosedError)
    raised_by(communicator.execute, CommunicatorClosedError)


def a_closed_communicator_holds_no_staging_memory(context: RankContext) -> None:
    """After close(), staging_bytes is 0."""
    held = context.closed_communicator.staging_bytes
    expect(held == 0, f"staging_bytes is {held}")


def closing_with_something_queued_is_fine(context: RankContext) -> None:
    """A with block that is left by an exception closes the communicator, whatever is queued."""
    if context.never_closes:
        skip("close() does not return")
    kept: list[EplbCommunicator] = []
    with contextlib.suppress(ZeroDivisionError), context.create() as communicator:
        kept.append(communicator)
        communicator.add_send(torch.zeros(64, device=context.device), (context.rank + 1) % context.world_size)
        raise ZeroDivisionError
    raised_by(kept[0].execute, CommunicatorClosedError)


def it_leaks_no_file_descriptors(context: RankContext) -> None:
    """Made, used and closed again and again, communicators leave no open file descriptors."""
    growth = _leaks(context).descriptors
    expect(growth < _CYCLES, f"{growth} more file descriptors are open after {_CYCLES} communicators")


def it_leaks_no_threads(context: RankContext) -> None:
    """Made, used and closed again and again, communicators leave no threads."""
    growth = _leaks(context).threads
    expect(growth < _CYCLES, f"{growth} more threads run after {_CYCLES} communicators")


def it_leaves_nothing_in_shared_memory(context: RankContext) -> None:
    """Made, used and closed again and again, communicators leave no files in /dev/shm."""
    left = _leaks(context).shared_files
    expect(not left, f"{len(left)} files are left in {_SHARED_MEMORY}, such as {', '.join(left[:3])}")


def it_leaks_no_memory(context: RankContext) -> None:
    """Made, used and closed again and again, communicators leave no memory allocated."""
    leaks = _leaks(context)
    grown = f"{leaks.memory_bytes >> 20} MiB of memory more after {_HALF} communicators, and again after as many"
    expect(leaks.memory_bytes < _GROWTH_BYTES, grown)
    expect(leaks.device_bytes <= 0, f"{leaks.device_bytes} bytes of device memory more after {_CYCLES} communicators")


def every_process_ends_with_0(context: RankContext) -> None:
    """The interpreter exits in order, with exit code 0, on every rank."""
    exchange(context, context.communicator, ring(context.world_size, 64))


@dataclass(frozen=True, slots=True)
class _Leaks:
    """What there is more of after some cycles than before them."""

    descriptors: int
    threads: int
    shared_files: list[str]
    memory_bytes: int
    device_bytes: int


def _leaks(context: RankContext) -> _Leaks:
    return context.once("leaks", lambda: _measure(context))


def _measure(context: RankContext) -> _Leaks:
    if context.never_closes:
        skip("close() does not return")

    def cycle(number: int) -> None:
        communicator = context.create()
        for epoch in range(_TRANSFERS):
            exchange(context, communicator, ring(context.world_size, 1 << 20), epoch)
        communicator.close()
        context.meet(f"cycle {number}")

    files = _shared_files()
    for number in range(_WARM_UP):
        cycle(number)
    descriptors, threads = _settled(lambda: _count("fd")), _settled(lambda: _count("task"))
    memory, device = [_resident_bytes()], _device_bytes(context)
    for number in range(_WARM_UP, _WARM_UP + _CYCLES):
        cycle(number)
        memory.append(_resident_bytes())
    return _Leaks(
        descriptors=_settled(lambda: _count("fd"), descriptors) - descriptors,
        threads=_settled(lambda: _count("task"), threads) - threads,
        shared_files=_left_behind(files),
        # What a library allocates once, whenever that is, is no leak: a leak goes on in both halves.
        memory_bytes=min(memory[_HALF] - memory[0], memory[-1] - memory[_HALF]),
        device_bytes=_device_bytes(context) - device,
    )


def _settled(count: Callable[[], int], target: int | None = None) -> int:
    """Return the count once it is not above `target`, or after a while."""
    ends = time.monotonic() + _SETTLE_S
    while target is not None and count() > target and time.monotonic() < ends:
        time.sleep(0.01)
    return count()


def _count(what: str) -> int:
    gc.collect()
    return len(os.listdir(f"/proc/self/{what}"))


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(context: RankContext) -> int:
    if context.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(context.device)


def _shared_files() -> dict[str, int]:
    """Return name -> inode of the files in /dev/shm."""
    found = {}
    if _SHARED_MEMORY.is_dir():
        for path in _SHARED_MEMORY.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found[path.name] = status.st_ino
    return found


def _left_behind(before: dict[str, int]) -> list[str]:
    """Return files that are new and that nobody has mapped or open: those of other programs' are in use."""
    ends = time.monotonic() + _SETTLE_S
    while True:
        fresh = {name: inode for name, inode in _shared_files().items() if name not in before}
        left = sorted(name for name in fresh if not _held_by_others(name))
        if not left or time.monotonic() > ends:
            return left
        time.sleep(0.05)


def _held_by_others(name: str) -> bool:
    """Return whether a process other than this one's siblings has mapped the file, or has it open."""
    path = str(_SHARED_MEMORY / name)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or _parent(process) == os.getppid():
            continue
        with contextlib.suppress(OSError):
            if path in (process / "maps").read_text():
                return True
            if any(os.readlink(handle) == path for handle in (process / "fd").iterdir()):
                return True
    return False


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


CHECKS = (
    Check(closing_returns, deadline_s=10.0),
    Check(closing_twice_is_fine, deadline_s=10.0),
    Check(a_closed_communicator_refuses_everything_else, deadline_s=10.0),
    Check(a_closed_communicator_holds_no_staging_memory, deadline_s=10.0),
    Check(closing_with_something_queued_is_fine, deadline_s=10.0),
    Check(it_leaks_no_file_descriptors),
    Check(it_leaks_no_threads),
    Check(it_leaves_nothing_in_shared_memory),
    Check(it_leaks_no_memory),
    Check(every_process_ends_with_0, place=Place.EXIT),
)
"""The checks of this module."""
