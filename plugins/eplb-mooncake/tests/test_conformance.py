"""The contract, by eplb's conformance kit, and what this transport promises beyond it. Over tcp, on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import torch

from eplb_core import EplbCommunicator
from eplb_core.testing import BackendConformance, Check, RankContext, expect

EXPERT_BYTES = (3 << 20) + 64  # three whole slots and a little more


def pass_on(context: RankContext, communicator: EplbCommunicator, sent: torch.Tensor, landing: torch.Tensor) -> None:
    """Send to the next rank and receive from the one before; every rank's bytes are its number."""
    sent.fill_(context.rank + 1)
    landing.zero_()
    communicator.add_send(sent, (context.rank + 1) % context.world_size)
    communicator.add_recv(landing, (context.rank - 1) % context.world_size)
    communicator.execute()
    before = (context.rank - 1) % context.world_size
    expect(bool((landing == before + 1).all()), f"wrong bytes from rank {before}")


def memory(nbytes: int = EXPERT_BYTES) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def registered_tensors_are_moved_without_a_copy(context: RankContext) -> None:
    """What is registered is read in place, and what is registered to land is read into in place."""
    communicator = context.fresh()
    sent, landing = memory(), memory()
    communicator.register([sent])
    communicator.register([landing], landing=True)
    pass_on(context, communicator, sent, landing)
    stats = communicator.last_stats
    expect(stats is not None and stats.phases["pack"] == 0, f"the sender packed: {stats}")
    expect(stats is not None and stats.phases["unpack"] == 0, f"the receiver unpacked: {stats}")


def only_landing_tensors_are_read_into_in_place(context: RankContext) -> None:
    """A READ that comes too late must not hit a tensor that is in use, so others go through the window."""
    communicator = context.fresh()
    sent, received = memory(), memory()
    communicator.register([sent, received])
    pass_on(context, communicator, sent, received)
    stats = communicator.last_stats
    expect(stats is not None and stats.phases["pack"] == 0, f"the sender packed: {stats}")
    expect(stats is not None and stats.phases["unpack"] > 0, f"the receiver did not unpack: {stats}")


def parts_of_registered_memory_may_be_registered_again(context: RankContext) -> None:
    """Overlapping tensors, which Mooncake refuses, arrive all the same."""
    communicator = context.fresh()
    whole = memory(4 * EXPERT_BYTES)
    parts = whole.view(4, EXPERT_BYTES)
    communicator.register([parts[0], parts[1], whole])
    communicator.register([parts[2], whole, parts[3]], landing=True)
    pass_on(context, communicator, parts[0], parts[2])
    pass_on(context, communicator, parts[1], parts[3])


def staging_keeps_within_the_window(context: RankContext) -> None:
    """Send and receive window together are never larger than the window option, and registering adds nothing."""
    communicator = context.fresh()
    communicator.register([memory()])
    held = communicator.staging_bytes
    expect(held <= 64 << 20, f"it holds {held} bytes")
    expect(held > 32 << 20, f"it holds {held} bytes only")


def internet_sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of every TCP socket of this process, open until the next one is asked for."""
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(handle))) as each:
            if each.family != socket.AF_UNIX:
                yield each


def listening_ports() -> set[int]:
    return {
        int(each.getsockname()[1])
        for each in internet_sockets()
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    }


def a_connection_that_broke_meanwhile_is_made_again(context: RankContext) -> None:
    """A READ that fails while the peer lives, as on a connection that something cut, is tried again."""
    before = listening_ports()
    communicator = context.fresh()
    context.tell(f"ports of {context.rank}", " ".join(map(str, listening_ports() - before)))
    source = (context.rank - 1) % context.world_size
    ports = {int(port) for port in context.ask(f"ports of {source}").split()}
    sent, received = memory(), memory()
    pass_on(context, communicator, sent, received)
    cut = 0
    for each in internet_sockets():
        if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and each.getpeername()[1] in ports:
            each.shutdown(socket.SHUT_RDWR)
            cut += 1
    expect(cut > 0, "there was no connection to cut")
    pass_on(context, communicator, sent, received)


class TestMooncake(BackendConformance):
    config = "mooncake"
    ranks = (2, 3)
    stateless = True
    background = True
    extra_checks = (
        Check(registered_tensors_are_moved_without_a_copy),
        Check(only_landing_tensors_are_read_into_in_place),
        Check(parts_of_registered_memory_may_be_registered_again),
        Check(staging_keeps_within_the_window),
        Check(a_connection_that_broke_meanwhile_is_made_again),
    )


class TestTheSmallestWindow(BackendConformance):
    config = "mooncake?window=8KiB"
    ranks = (4,)
    checks = (
        "messages_of_a_pair_keep_their_order",
        "many_small_tensors_arrive",
        "uneven_traffic_arrives",
        "every_rank_sends_to_every_other",
    )
