"""Every host keeps a share of all experts in memory: those whose last holder died come back from there, not from disk.

What is kept are the bytes of the slots, as the engine has made them: quantised, shuffled, ready to use. So they fit any
placement, of any group of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from eplb_core.control.agreement import agree_on_outcome, all_answer
from eplb_core.errors import HandshakeError, InputError
from eplb_core.planning.placement import EMPTY, check_placement
from eplb_core.rearrange.expert_exchange import Passage, exchange_experts
from eplb_core.rearrange.host_memory import hosts_of_ranks, pin, share_memory
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.transport.streams import on_stream, synchronize

if TYPE_CHECKING:
    from eplb_core.arrays import IntArray
    from eplb_core.contract.communicator import EplbCommunicator

STAGING_BYTES = 128 << 20
"""The most that a rank stages of what it sends, and of what it receives, in bytes."""


class HostBackup:
    """Keeps all experts in host memory, shared evenly among the hosts. Give it to `Rearranger.run` as its `loader`.

    The ranks of a host share its memory, so an expert is there as long as any rank of the host is. Where they cannot
    (another user, another PID namespace), each rank keeps a share of its own, which goes with it.

    Every rank makes one, at the same time::

        backup = HostBackup(communicator, weights, placement)
        ...
        backup = backup.over(survivors)  # a communicator of the ranks that are left, or of a larger group
        Rearranger(survivors, weights).run(old, new, ranks_before=..., loader=backup)

    Args:
        communicator: between the ranks; stays the caller's to close.
        weights: `weights[layer][tensor]`, as for `Rearranger`.
        placement: int64 `[layers, slots]`, what the slots hold now.
        copies: on how many hosts each expert is kept. One outlives any rank; more outlive hosts too, if there are so
            many.

    Raises:
        InputError: the weights or the placement cannot be used, or `copies` is less than 1.
        HandshakeError: the ranks were given different things, one did not call, or one has too little memory.
        TransferError: an expert did not arrive where it is to be kept.
    """

    def __init__(
        self,
        communicator: EplbCommunicator,
        weights: Sequence[Sequence[torch.Tensor]],
        placement: npt.ArrayLike,
        *,
        copies: int = 1,
    ) -> None:
        self._bind(communicator)
        problem: Exception | None = None
        try:
            if copies < 1:
                raise InputError(f"an expert must be kept on at least 1 host, not {copies}")
            self._weights = ExpertWeights(weights)
            placed = check_placement(placement, self._world_size)
            if placed.shape != (len(self._weights.layers), self._world_size * self._weights.num_slots):
                raise InputError(
                    f"the placement has shape {list(placed.shape)}, the weights have {len(self._weights.layers)} "
                    f"layers of {self._weights.num_slots} slots a rank"
                )
        except Exception as error:  # noqa: BLE001 - the other ranks must know
            problem = error
        self._agree("the arguments of the host backup", problem)
        self._agree_on_value(f"{self._weights.description}; {copies} copies; {placed.tobytes().hex()}")
        self._sizes = self._weights.payload_bytes
        self._experts = sorted({(layer, expert) for layer, row in enumerate(placed.tolist()) for expert in row} - {
            (layer, EMPTY) for layer in range(len(placed))
        })  # fmt: skip
        hosts = hosts_of_ranks(self._control, self._timeout_s)
        shares, nbytes = self._share(max(hosts) + 1, copies)
        memory = share_memory(self._control, hosts, nbytes, self._rank, self._timeout_s)
        if memory is None:  # ranks that cannot share are hosts of one
            hosts = list(range(self._world_size))
            shares, nbytes = self._share(self._world_size, copies)
            with torch.inference_mode(False):
                memory = torch.empty(nbytes[self._rank], dtype=torch.uint8)
        self._hosts: list[int] | None = hosts
        self._shares = shares
        self._memory: torch.Tensor | None = memory
        self._kept = shares[hosts[self._rank]]
        if self._weights.device.type == "cuda":
            pin(memory)
        self.renew(placed)

    @property
    def nbytes(self) -> int:
        """Bytes of experts that this rank's host keeps, once for all of its ranks."""
        return 0 if self._memory is None else self._memory.numel()

    @property
    def experts(self) -> frozenset[tuple[int, int]]:
        """`(layer, expert)` of each that this rank's host keeps."""
        return frozenset(self._kept)

    def over(self, communicator: EplbCommunicator) -> HostBackup:
        """Return the same backup over another communicator, such as one of the ranks that are left after a death.

        Every rank of that communicator needs one: a rank that has joined gets it from `nothing_kept`.
        """
        other = object.__new__(HostBackup)
        other.__dict__.update(self.__dict__)
        other._hosts = None  # they are those of other ranks
        other._bind(communicator)
        return other

    @classmethod
    def nothing_kept(cls, communicator: EplbCommunicator, weights: Sequence[Sequence[torch.Tensor]]) -> HostBackup:
        """Return the backup of a rank that has joined later: it keeps nothing, and gets experts from the others."""
        backup = object.__new__(cls)
        backup._weights = ExpertWeights(weights)
        backup._sizes = backup._weights.payload_bytes
        backup._memory, backup._kept, backup._hosts = None, {}, None
        backup._bind(communicator)
        return backup

    def renew(self, placement: npt.ArrayLike) -> None:
        """Keep the experts as they are in the slots now, after the weights were loaded anew. Every rank calls this.

        Args:
            placement: int64 `[layers, slots]`, what the slots hold; the same experts as at first.

        Raises:
            InputError: an expert is in no slot, or this backup is over another communicator than at first.
            HandshakeError: a rank did not call.
            TransferError: an expert did not arrive where it is to be kept. What is kept is then in part older.
        """
        hosts = self._hosts
        if hosts is None:
            raise InputError(
                "a backup over another communicator than at first cannot be renewed", remedy="make a new HostBackup"
            )
        holders: dict[tuple[int, int], list[int]] = {}
        slots = self._weights.num_slots
        for layer, row in enumerate(np.asarray(placement, np.int64).tolist()):
            for slot, expert in enumerate(row):
                holders.setdefault((layer, expert), []).append(slot)
        absent = [each for each in self._experts if each not in holders]
        if absent:
            raise InputError(f"expert {absent[0][1]} of layer {absent[0][0]} is in no slot, so it cannot be kept")
        busy = [0] * self._world_size
        passages: list[Passage] = []
        copied: list[tuple[int, int, int]] = []
        for host, kept in enumerate(self._shares):
            members = [rank for rank, other in enumerate(hosts) if other == host]
            for layer, expert in kept:
                near = [slot for slot in holders[layer, expert] if slot // slots in members]
                source = min(near or holders[layer, expert], key=lambda slot: busy[slot // slots])
                busy[source // slots] += 1
                if near:
                    copied.append((layer, expert, source))
                    continue
                target = min(members, key=lambda rank: busy[rank])
                busy[target] += 1
                passages.append(Passage(source // slots, target, layer, expert, source, int(self._sizes[layer])))
        problem: Exception | None = None
        try:
            for layer, expert, slot in copied:
                if slot // slots == self._rank:
                    self._pack(layer, slot % slots, self._place(layer, expert))
            exchange_experts(
                self._communicator,
                passages,
                self._rank,
                self._limit_bytes(),
                read=lambda each, part: self._pack(each.layer, each.slot % slots, part),
                write=lambda each, part: self._place(each.layer, each.expert).copy_(part),
            )
            synchronize(self._weights.device, None)
        except Exception as error:  # noqa: BLE001 - the other ranks must know
            problem = error
        self._agree("keeping experts in host memory", problem)

    def restore(self, lost: IntArray, weights: ExpertWeights, stream: torch.cuda.Stream | None) -> None:
        """Fill this rank's slots of lost experts, from this host's memory or another's. Every rank calls this.

        Args:
            lost: int64 `[lost, 3]`: layer, slot counted over all ranks, expert; the same on every rank.
            weights: this rank's slots.
            stream: where the copies go.

        Raises:
            InputError: no host that is left has kept one of them; the same on every rank.
            HandshakeError: a rank did not answer.
            TransferError: one did not arrive.
        """
        wanted = sorted({(layer, expert) for layer, _, expert in lost.tolist()})
        mine = bytes(each in self._kept for each in wanted)
        said = [
            answer.value for answer in all_answer(self._control, "which experts are kept", self._timeout_s, value=mine)
        ]
        if {len(value) for value in said} != {len(wanted)}:
            raise HandshakeError("the ranks have lost different experts", table={})
        keepers = {each: [rank for rank, value in enumerate(said) if value[i]] for i, each in enumerate(wanted)}
        nowhere = [each for each, ranks in keepers.items() if not ranks]
        if nowhere:
            raise InputError(
                f"{len(nowhere)} lost experts are kept by no host that is left, "
                f"the first is expert {nowhere[0][1]} of layer {nowhere[0][0]}",
                remedy="keep more copies, or give a loader that reads a checkpoint",
            )
        busy = [0] * self._world_size
        passages: list[Passage] = []
        slots = weights.num_slots
        for layer, slot, expert in lost.tolist():
            target = slot // slots
            if target in keepers[layer, expert]:
                if target == self._rank:
                    with on_stream(weights.device, stream):
                        self._unpack(weights, layer, slot % slots, self._place(layer, expert))
                continue
            source = min(keepers[layer, expert], key=lambda rank: busy[rank])
            busy[source] += 1
            passages.append(Passage(source, target, layer, expert, slot, int(self._sizes[layer])))
        exchange_experts(
            self._communicator,
            passages,
            self._rank,
            self._limit_bytes(),
            read=lambda each, part: part.copy_(self._place(each.layer, each.expert)),
            write=lambda each, part: self._unpack(weights, each.layer, each.slot % slots, part),
            stream=stream,
        )
        synchronize(weights.device, stream)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _bind(self, communicator: EplbCommunicator) -> None:
        binding = communicator.binding
        context = binding.context
        self._communicator = communicator
        self._rank, self._world_size, self._timeout_s = context.rank, context.world_size, binding.timeout_s
        numbers = binding.shared.setdefault("host backups", itertools.count())
        self._control = context.control.scoped(f"host backup {next(numbers)}")

    def _share(self, num_hosts: int, copies: int) -> tuple[list[dict[tuple[int, int], int]], list[int]]:
        """Return, for each host, the experts that it keeps and where each begins, and its bytes."""
        shares: list[dict[tuple[int, int], int]] = [{} for _ in range(num_hosts)]
        nbytes = [0] * num_hosts
        for number, (layer, expert) in enumerate(self._experts):
            for copy in range(min(copies, num_hosts)):
                host = (number + copy) % num_hosts
                shares[host][layer, expert] = nbytes[host]
                nbytes[host] += int(self._sizes[layer])
        return shares, nbytes

    def _place(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes in this host's memory, uint8 `[bytes]`."""
        if self._memory is None:
            raise InputError("this rank keeps nothing")
        first = self._kept[layer, expert]
        return self._memory[first : first + int(self._sizes[layer])]

    def _pack(self, layer: int, slot: int, part: torch.Tensor) -> None:
        first = 0
        for row in self._weights.slot(layer, slot):
            part[first : first + len(row)].copy_(row)
            first += len(row)

    def _unpack(self, weights: ExpertWeights, layer: int, slot: int, part: torch.Tensor) -> None:
        first = 0
        for row in weights.slot(layer, slot):
            row.copy_(part[first : first + len(row)])
            first += len(row)

    def _limit_bytes(self) -> int:
        limit = self._communicator.transfer_limit_bytes
        return STAGING_BYTES if limit is None else min(limit, STAGING_BYTES)

    def _agree(self, what: str, problem: Exception | None) -> None:
        agree_on_outcome(self._control, what, problem, 2 * self._timeout_s)

    def _agree_on_value(self, value: str) -> None:
        digest = hashlib.sha256(value.encode()).hexdigest()[:16]
        said = [
            a.value.decode() for a in all_answer(self._control, "what is kept", self._timeout_s, value=digest.encode())
        ]
        if len(set(said)) > 1:
            raise HandshakeError(
                "the ranks were given different weights, placements or numbers of copies to keep",
                table={"digest": said},
            )
