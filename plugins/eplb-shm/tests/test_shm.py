"""What is this transport's own: nothing is left behind, windows are bounded and private, only one host will do."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from eplb_shm.chunks import cut, pack, unpack
from eplb_shm.window import Window, map_window, probe

from eplb_core.testing import Check, RankContext, Status, Subject, expect, run_conformance
from eplb_core.transport import HostIdentity, Payload

SHM = Subject(config="shm?window=64KiB", stateless=True, background=True)


def verdict(check: Check, ranks: int = 2) -> tuple[Status, str]:
    result = run_conformance([SHM], ranks, [check]).of(check.name)
    return result.status, result.detail


# --- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [0], [1], [16], [15, 1], [17], [5, 5, 5, 5], [100, 0, 3], [16, 16], [33, 47]])
def test_both_sides_cut_alike_whatever_the_sizes(sizes: list[int]) -> None:
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    received = [torch.zeros_like(tensor) for tensor in sent]
    chunks = cut({1: [*map(Payload, sent)]}, 16).get(1, [])
    places = cut({0: [*map(Payload, received)]}, 16).get(0, [])
    slot = np.zeros(16, np.uint8)
    for chunk, place in zip(chunks, places, strict=True):
        pack(chunk, slot)
        unpack(slot, place)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))
    assert len(chunks) == -(-sum(sizes) // 16)


def test_each_peer_has_chunks_of_its_own() -> None:
    payload = Payload(torch.zeros(10, dtype=torch.uint8))
    chunks_of = cut({1: [payload, payload], 2: [payload]}, 16)
    lengths = {peer: [sum(map(len, chunk)) for chunk in chunks] for peer, chunks in chunks_of.items()}
    assert lengths == {1: [16, 4], 2: [10]}


# --- the window ------------------------------------------------------------------------------------------------------


def test_a_window_cannot_be_written_by_who_maps_it_to_read() -> None:
    window = Window(4096)
    seen = map_window(window.handle, 4096, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 1
    window.close()


def test_a_window_cannot_be_shrunk_under_its_readers() -> None:
    window = Window(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(window.handle, 1)
    window.close()


def test_a_window_that_is_dropped_without_being_closed_leaves_no_descriptor() -> None:
    before = memory_descriptors()
    window = Window(4096)
    assert len(memory_descriptors()) > len(before)
    del window
    gc.collect()
    assert memory_descriptors() == before


def memory_descriptors() -> list[str]:
    """Return what this process's descriptors of windows are called."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder is gone
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if "eplb-shm" in name]


def test_memory_that_can_be_shrunk_is_not_mapped() -> None:
    handle = os.memfd_create("short")
    os.ftruncate(handle, 4096)
    with pytest.raises(RuntimeError, match="not a window of 4096 bytes"):
        map_window(handle, 4096, writable=False)
    os.close(handle)


@pytest.mark.parametrize("nbytes", [4096, 5000, 1 << 20, 64 << 20, 1 << 30])
def test_slots_lie_inside_the_window_and_are_few(nbytes: int) -> None:
    window = Window(nbytes)
    assert 4 <= len(window.free) <= 64
    assert all(len(window.slot(number)) == window.slot_bytes for number in window.free)
    window.close()


def test_the_probe_says_what_it_tried() -> None:
    assert probe("cpu").available
    assert "shared memory was written and read" in probe("cpu").reason


# --- between processes -----------------------------------------------------------------------------------------------


def staging_is_the_window(context: RankContext) -> None:
    """staging_bytes is the window option, with any number of ranks."""
    held = context.communicator.staging_bytes
    expect(held == 64 << 10, f"it is {held}")


def test_staging_does_not_grow_with_the_number_of_ranks() -> None:
    for ranks in (2, 5):
        assert verdict(Check(staging_is_the_window), ranks)[0] is Status.PASSED


def nothing_has_a_name(context: RankContext) -> None:
    """While it is open, it has neither a file in /dev/shm nor a socket in the file system."""
    _ = context.communicator
    context.communicator.execute()
    mapped = Path("/proc/self/maps").read_text()
    expect("memfd:eplb-shm (deleted)" in mapped, "its window is not mapped")
    expect("/dev/shm/" not in mapped, "a file of /dev/shm is mapped")
    mine = {os.readlink(f"/proc/self/fd/{number}") for number in _handles()}
    named = [
        line
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if f"socket:[{line.split()[6]}]" in mine and line.split()[7:] and not line.split()[7].startswith("@")
    ]
    expect(not named, f"sockets have names: {named}")


def _handles() -> list[str]:
    alive = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.readlink(f"/proc/self/fd/{number}")
            alive.append(number)
    return alive


def test_nothing_has_a_name_that_could_be_left_behind() -> None:
    status, detail = verdict(Check(nothing_has_a_name))
    assert status is Status.PASSED, detail


def all_are_killed(context: RankContext) -> None:
    """All ranks but the first are killed amid transfers, and the first with them."""
    _ = context.communicator
    context.meet("connected")
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_when_all_ranks_are_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    status, detail = verdict(Check(all_are_killed))
    assert status is Status.FAILED
    assert "SIGKILL" in detail
    assert set(os.listdir("/dev/shm")) <= before


def another_place(context: RankContext) -> None:
    """A rank that seems to be on another host is refused on every rank, by number."""
    here = HostIdentity.loopback
    if context.rank == 1:
        HostIdentity.loopback = property(lambda self: bytes(24))  # as another host's boot id would be
    try:
        context.create()
    except RuntimeError as error:
        expect("rank 1 is on another host" in str(error), str(error))
    else:
        expect(False, "it was built all the same")
    finally:
        HostIdentity.loopback = here


def test_ranks_on_different_hosts_are_refused_with_the_rank() -> None:
    status, detail = verdict(Check(another_place))
    assert status is Status.PASSED, detail
