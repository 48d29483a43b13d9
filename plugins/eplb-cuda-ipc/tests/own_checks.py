"""What this transport promises beyond the contract, as checks that run in real ranks.

Those in `ON_ANY_DEVICE` and `RESCUE` run over the stand-in and, where there is one, on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import standin
import torch
import torch.distributed as dist
from eplb_cuda_ipc.memory import Copies
from standin import ENGINE, HostMemory

from eplb_core import EplbCommunicator, Rearranger, StatelessGroup
from eplb_core.errors import (
    BackendUnavailableError,
    EplbError,
    InputError,
    InvalidTransferError,
    PeerLostError,
    TransferError,
    TransferMismatchError,
    TransferTimeoutError,
)
from eplb_core.testing import Check, RankContext, expect

ROWS, ROW_BYTES = 6, 40_000


def pattern(*seed: int, nbytes: int = ROW_BYTES) -> torch.Tensor:
    """Return uint8 `[nbytes]` that depend on `seed` alone."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))


def shared(context: RankContext, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Return zeros in memory that other processes can map."""
    if context.device.type == "cpu":
        return ENGINE.shared(*shape, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=context.device)


def is_pattern(tensor: torch.Tensor, *seed: int) -> bool:
    return torch.equal(tensor.cpu(), pattern(*seed))


def neighbours(context: RankContext) -> tuple[int, int]:
    return (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size


@contextlib.contextmanager
def raises(kind: type[EplbError], words: str) -> Iterator[list[EplbError]]:
    """Expect an error of exactly this kind, with these words in it; the list holds it afterwards."""
    caught: list[EplbError] = []
    try:
        yield caught
    except EplbError as error:
        expect(type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}")
        expect(words in str(error), f"{words!r} is not in: {error}")
        caught.append(error)
    expect(caught, f"no {kind.__name__} was raised")


def blamed(caught: list[EplbError]) -> tuple[int, ...]:
    return caught[0].peers if caught and isinstance(caught[0], TransferError) else ()


# --- mapped memory ---------------------------------------------------------------------------------------------------


def pass_on(
    context: RankContext, communicator: EplbCommunicator, sent: torch.Tensor, landing: torch.Tensor, epoch: int = 0
) -> None:
    """Send rows to the next rank and receive from the one before."""
    after, before = neighbours(context)
    for row in range(len(sent)):
        sent[row] = pattern(context.rank, row, epoch)
    landing.zero_()
    for row in range(len(sent)):
        communicator.add_send(sent[row], after)
        communicator.add_recv(landing[row], before)
    communicator.execute()
    sent.fill_(0x55)  # no peer still reads it
    wrong = [row for row in range(len(sent)) if not is_pattern(landing[row], before, row, epoch)]
    expect(not wrong, f"rows {wrong} from rank {before} are wrong in epoch {epoch}")


def registered_memory_is_read_where_it_lies(context: RankContext) -> None:
    """What is registered is copied out of the sender's memory, and neighbours as one."""
    communicator = context.fresh()
    sent = shared(context, ROWS, ROW_BYTES)
    landing = torch.zeros(ROWS, ROW_BYTES, dtype=torch.uint8, device=context.device)
    communicator.register([sent])
    for epoch in range(3):
        pass_on(context, communicator, sent, landing, epoch)
        stats = communicator.last_stats
        expect(stats is not None and (stats.descriptors, stats.descriptors_merged) == (ROWS, 1), f"{stats}")
        expect(stats is not None and stats.paths[neighbours(context)[0]].startswith("cuda ipc, "), f"{stats}")


def memory_that_cannot_be_mapped_is_packed(context: RankContext) -> None:
    """Tensors in memory of another kind arrive although they were registered, and pairs may mix both kinds."""
    communicator = context.fresh()
    other = torch.zeros(ROWS, ROW_BYTES, dtype=torch.uint8)
    mixed = [ENGINE.shared(ROW_BYTES) if row % 2 else other[row] for row in range(ROWS)]
    communicator.register(mixed)
    after, before = neighbours(context)
    landing = torch.zeros(ROWS, ROW_BYTES, dtype=torch.uint8)
    for row, tensor in enumerate(mixed):
        tensor.copy_(pattern(context.rank, row))
        communicator.add_send(tensor, after)
        communicator.add_recv(landing[row], before)
    communicator.execute()
    expect(all(torch.equal(landing[row], pattern(before, row)) for row in range(ROWS)), "wrong bytes")
    stats = communicator.last_stats
    expect(stats is not None and stats.descriptors == ROWS // 2, f"{stats}")


def registering_goes_on_between_transfers(context: RankContext) -> None:
    """Allocations may be registered at any time, by some ranks only, and again."""
    communicator = context.fresh()
    landing = torch.zeros(ROWS, ROW_BYTES, dtype=torch.uint8, device=context.device)
    for epoch in range(3):
        sent = shared(context, ROWS, ROW_BYTES)
        if context.rank != epoch:
            communicator.register([sent[1], sent, sent[:2]])
        pass_on(context, communicator, sent, landing, epoch)


def several_transfers_of_mapped_memory_may_be_under_way(context: RankContext) -> None:
    """Transfers that are started before an earlier one has ended keep their bytes apart."""
    communicator = context.fresh()
    communicator.trust_matching(True)
    after, before = neighbours(context)
    sent, landing = shared(context, 4, ROW_BYTES), shared(context, 4, ROW_BYTES)
    communicator.register([sent, landing])
    pending = []
    for row in range(4):
        sent[row] = pattern(context.rank, row)
        communicator.add_send(sent[row], after)
        communicator.add_recv(landing[row], before)
        pending.append(communicator.start())
    for row in range(4):
        pending[row].wait()
        expect(is_pattern(landing[row], before, row), f"transfer {row} brought wrong bytes")


# --- the engine's stream ---------------------------------------------------------------------------------------------


def the_engines_stream_is_waited_for(context: RankContext) -> None:
    """What the engine's stream has yet to write is sent, and what it has yet to do with a landing tensor is done."""
    communicator = context.fresh()
    after, before = neighbours(context)
    for registered in (True, False):
        sent, landing, seen = (ENGINE.shared(ROW_BYTES) for _ in range(3))
        if registered:
            communicator.register([sent])
        landing.fill_(1)

        def work(sent: torch.Tensor = sent, landing: torch.Tensor = landing, seen: torch.Tensor = seen) -> None:
            time.sleep(0.02 * (1 + context.rank))
            seen.copy_(landing)
            landing.fill_(2)
            sent.copy_(pattern(context.rank))

        ENGINE.stream.enqueue(work)
        communicator.add_send(sent, after)
        communicator.add_recv(landing, before)
        communicator.execute()
        expect(bool((seen == 1).all()), "bytes landed before the stream was through with the tensor")
        expect(torch.equal(landing, pattern(before)), "the transfer did not wait for the stream")


def a_stream_that_does_not_come_is_told_from_a_peer_that_does_not(context: RankContext) -> None:
    """A rank whose own stream hangs says so; its peer names it; nothing was copied, and neither waits too long."""
    communicator = context.fresh(timeout_s=0.5)
    late = 0
    released = threading.Event()
    if context.rank == late:
        ENGINE.stream.enqueue(lambda: released.wait(20) and None)
    landing = torch.zeros(64, dtype=torch.uint8)
    if context.rank == late:
        communicator.add_send(torch.ones(64, dtype=torch.uint8), 1)
        with raises(TransferTimeoutError, "this rank's stream"):
            communicator.execute()
        released.set()
    elif context.rank == 1:
        communicator.add_recv(landing, late)
        with raises(TransferTimeoutError, "rank 0") as caught:
            communicator.execute()
        expect(blamed(caught) == (late,), f"it names {blamed(caught)}")
        expect(not landing.any(), "something was copied")
    else:
        communicator.execute()


class Late:
    """A place that its stream comes to when it was looked at often enough."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    def query(self) -> bool:
        self._left -= 1
        return self._left < 0


def a_transfer_on_another_stream_does_not_overtake(context: RankContext) -> None:
    """While a transfer's stream is late, the next one, whose stream is not, leaves it the slots that it needs."""
    communicator = context.fresh(timeout_s=2.0)
    communicator.trust_matching(True)
    tensors = [torch.full((8 << 20,), context.rank, dtype=torch.uint8) for _ in range(2)]
    end_of = HostMemory.end_of
    looks = iter((300, 0))
    if context.rank == 0:
        HostMemory.end_of = lambda self, stream: Late(next(looks))  # type: ignore[assignment, method-assign]
    try:
        if context.rank == 0:
            pending = []
            for tensor in tensors:
                communicator.add_send(tensor, 1)
                pending.append(communicator.start())
            for each in pending:
                each.wait()
        elif context.rank == 1:
            for tensor in tensors:
                communicator.add_recv(tensor, 0)
                communicator.execute()
                expect(not tensor.any(), "wrong bytes")
    finally:
        HostMemory.end_of = end_of  # type: ignore[method-assign]


# --- failures --------------------------------------------------------------------------------------------------------


def pairs_compare_what_they_trust(context: RankContext) -> None:
    """Under trust_matching a pair that does not match raises TransferMismatchError on both sides, before any copy."""
    communicator = context.fresh()
    communicator.trust_matching(True)
    landing = torch.zeros(128, dtype=torch.uint8, device=context.device)
    if context.rank == 0:
        communicator.add_send(torch.ones(64, dtype=torch.uint8, device=context.device), 1)
    elif context.rank == 1:
        communicator.add_recv(landing, 0)
    else:
        with contextlib.suppress(TransferMismatchError):  # if the others are through with it by now
            communicator.execute()
        return
    with raises(TransferMismatchError, "rank"):
        communicator.execute()
    expect(not landing.any(), "something was copied")


def who_closes_first_is_missed_by_the_others(context: RankContext) -> None:
    """Once a rank has closed its communicator, the others raise PeerLostError with its number."""
    communicator = context.fresh(own_groups=True)
    communicator.execute()
    if context.rank == 0:
        communicator.close()
        context.tell("closed")
        return
    context.ask("closed")
    with raises(PeerLostError, "rank 0 is gone") as caught:
        communicator.execute()
    expect(blamed(caught) == (0,), f"it names {blamed(caught)}")
    with raises(InvalidTransferError, "may have freed its memory"):
        communicator.rescue(0)  # type: ignore[attr-defined]


def an_error_is_raised_when_this_ranks_copies_have_ended(context: RankContext) -> None:
    """Nothing lands after an error, although the peer went amid a copy: the tensor may be used again at once."""
    communicator = context.fresh()
    communicator.trust_matching(True)
    copy = HostMemory.copy
    pause_s = standin.PAUSE_S

    def copy_slowly(self: HostMemory, copies: Copies) -> standin.StreamMark:
        standin.PAUSE_S = 0.1
        mark = copy(self, copies)
        context.tell("copying")
        return mark

    if context.rank == 0:
        sent = ENGINE.shared(ROW_BYTES)
        communicator.register([sent])
        communicator.add_send(sent, 1)
        communicator.start()
        context.ask("copying")
        communicator.close()
    elif context.rank == 1:
        landing = torch.zeros(ROW_BYTES, dtype=torch.uint8)
        HostMemory.copy = copy_slowly  # type: ignore[method-assign]
        try:
            communicator.add_recv(landing, 0)
            with raises(PeerLostError, "rank 0 is gone"):
                communicator.execute()
            landing.fill_(7)
            communicator.close()  # which waits for the stand-in's stream
            expect(bool((landing == 7).all()), "bytes landed after the error")
        finally:
            HostMemory.copy = copy  # type: ignore[method-assign]
            standin.PAUSE_S = pause_s


def ranks_whose_gpus_do_not_reach_one_another_are_refused(context: RankContext) -> None:
    """Without peer-to-peer access every rank raises the same error, with the ranks."""
    if context.rank == 1:
        standin.GPU = "another"
    try:
        with raises(
            BackendUnavailableError, "rank 0 cannot read the memory of rank 1: there is no peer-to-peer access"
        ):
            context.create()
    finally:
        standin.GPU = "host"


def a_mapping_that_shows_other_bytes_is_refused(context: RankContext) -> None:
    """Memory is read once before it is relied on."""
    read = HostMemory.read
    if context.rank == 0:
        HostMemory.read = lambda self, address, nbytes: bytes(nbytes)  # type: ignore[method-assign]
    try:
        with raises(BackendUnavailableError, "rank 0 reads different bytes than rank 1 has written"):
            context.create()
    finally:
        HostMemory.read = read  # type: ignore[method-assign]


def a_rank_without_memory_for_its_window_is_told_by_all(context: RankContext) -> None:
    """What goes wrong on one rank while it connects is raised on every rank, at once."""

    def refuse(self: HostMemory, nbytes: int) -> int:
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    allocate = HostMemory.allocate
    if context.rank == 1:
        HostMemory.allocate = refuse  # type: ignore[method-assign]
    try:
        with raises(BackendUnavailableError, "rank 1 has no memory to share: CUDA_ERROR_OUT_OF_MEMORY"):
            context.create()
    finally:
        HostMemory.allocate = allocate  # type: ignore[method-assign]


# --- rearranging, and rescuing what a dead rank had ------------------------------------------------------------------

LAYERS, SLOTS = 3, 4


def expert(layer: int, number: int) -> torch.Tensor:
    return pattern(7, layer, number)


def weights_of(context: RankContext, placement: np.ndarray) -> list[torch.Tensor]:
    """Return one tensor `[slots, bytes]` for each layer, filled as the placement says."""
    layers = [shared(context, SLOTS, ROW_BYTES) for _ in range(LAYERS)]
    for layer, slots in enumerate(layers):
        for slot in range(SLOTS):
            slots[slot] = expert(layer, int(placement[layer, context.rank * SLOTS + slot]))
    return layers


def expect_placed(layers: list[torch.Tensor], placement: np.ndarray, rank: int) -> None:
    for layer, slots in enumerate(layers):
        for slot in range(SLOTS):
            number = int(placement[layer, rank * SLOTS + slot])
            expect(torch.equal(slots[slot].cpu(), expert(layer, number)), f"layer {layer}, slot {slot} is not {number}")


def a_rearrangement_moves_weights_out_of_mapped_memory(context: RankContext) -> None:
    """Whole placements, also received in place: every slot holds what it should, and no weight is packed."""
    communicator = context.fresh()
    rng = np.random.default_rng(3)
    experts = context.world_size * SLOTS
    old = np.stack([rng.permutation(experts) for _ in range(LAYERS)])
    layers = weights_of(context, old)
    rearranger = Rearranger(communicator, [[layer] for layer in layers], in_place="always")
    for _ in range(3):
        new = np.stack([rng.permutation(experts) for _ in range(LAYERS)])
        held = rearranger.run(old, new).placement
        expect_placed(layers, held, context.rank)
        old = held
    stats = communicator.last_stats
    expect(stats is not None and (stats.descriptors > 0 or not stats.bytes_received), f"weights were packed: {stats}")


def a_dead_ranks_experts_are_rescued_from_its_mapping(context: RankContext) -> None:
    """A rank is killed; its peers read its experts out of its memory, and rearrange among themselves with them."""
    victim = context.world_size - 1
    communicator = context.fresh(timeout_s=1.0 if context.device.type == "cpu" else 5.0)
    old = np.stack([np.roll(np.arange(context.world_size * SLOTS), layer) for layer in range(LAYERS)])
    layers = weights_of(context, old)
    odd = shared(context, 2, 3, 8, dtype=torch.int32)
    odd.copy_(torch.arange(48).view(2, 3, 8) + context.rank)
    communicator.register([*layers, odd[:, 1:]])
    communicator.execute()
    with raises(InvalidTransferError, "its process still runs"):
        communicator.rescue(victim if context.rank == 0 else 0)  # type: ignore[attr-defined]
    communicator.trust_matching(True)  # so that nobody waits for the dead one at the control plane
    context.meet("all work")
    if context.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            communicator.execute()
    except TransferError as error:
        expect(victim in error.peers, f"it names {error.peers}: {error}")
    before = mappings()
    with communicator.rescue(victim) as left:  # type: ignore[attr-defined]
        expect(len(left) == LAYERS + 1, f"{len(left)} tensors can be rescued")
        rescued = left.tensor(LAYERS).cpu()
        expect(torch.equal(rescued, (torch.arange(48).view(2, 3, 8) + victim)[:, 1:]), "a view was rescued wrong")
        rearrange_without(context, victim, old, layers, lambda layer, slot: left.tensor(layer, slot))
        with raises(InputError, "no row 9"):
            left.tensor(0, 9)
        with raises(InputError, "no tensor 99"):
            left.tensor(99)
    with raises(InputError, "cannot be rescued"):
        left.tensor(0)
    expect(context.device.type != "cpu" or mappings() < before, "the dead rank's memory is still mapped")


def rearrange_without(
    context: RankContext, victim: int, old: np.ndarray, layers: list[torch.Tensor], rescued: object
) -> None:
    """Give the victim's first experts to rank 0, and check what all survivors then hold."""
    store = dist.PrefixStore("survivors", context.environment.store)
    survivors = context.create(StatelessGroup(context.rank, victim, store))
    new = old[:, : victim * SLOTS].copy()
    new[:, 0] = old[:, victim * SLOTS]
    new[:, 1] = old[:, SLOTS]  # and something that the survivors move among themselves
    slot_of = {
        (layer, int(old[layer, slot])): slot - victim * SLOTS for layer in range(LAYERS) for slot in range(len(old[0]))
    }

    def load(layer: int, number: int) -> list[torch.Tensor]:
        return [rescued(layer, slot_of[layer, number])]  # type: ignore[operator]

    result = Rearranger(survivors, [[layer] for layer in layers]).run(
        old, new, ranks_before={rank: rank for rank in range(victim)}, loader=load
    )
    expect(bool((result.placement == new).all()), "another placement")
    expect_placed(layers, new, context.rank)
    survivors.close()


def mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum("memfd:standin" in line for line in maps)


ON_ANY_DEVICE = (
    Check(registered_memory_is_read_where_it_lies),
    Check(registering_goes_on_between_transfers),
    Check(several_transfers_of_mapped_memory_may_be_under_way),
    Check(a_rearrangement_moves_weights_out_of_mapped_memory),
    Check(pairs_compare_what_they_trust),
)
"""For any number of ranks."""

ON_STANDIN = (
    *ON_ANY_DEVICE,
    Check(memory_that_cannot_be_mapped_is_packed),
    Check(the_engines_stream_is_waited_for),
)
"""For any number of ranks; on a GPU the kit looks at streams."""

FAILURES = (
    Check(a_stream_that_does_not_come_is_told_from_a_peer_that_does_not),
    Check(a_transfer_on_another_stream_does_not_overtake),
    Check(an_error_is_raised_when_this_ranks_copies_have_ended),
    Check(who_closes_first_is_missed_by_the_others),
    Check(ranks_whose_gpus_do_not_reach_one_another_are_refused),
    Check(a_mapping_that_shows_other_bytes_is_refused),
    Check(a_rank_without_memory_for_its_window_is_told_by_all),
)
"""Over the stand-in, once."""

RESCUE = (Check(a_dead_ranks_experts_are_rescued_from_its_mapping, least_ranks=3, kills=True),)
"""Its last rank does not survive it."""
