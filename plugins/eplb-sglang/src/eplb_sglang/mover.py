"""Moves SGLang's experts: a communicator, a `Rearranger` for all layers, and placements in SGLang's numbering.

Knows no SGLang: `engine.py` and `hooks.py` do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eplb_core import Rearranger, RearrangeResult, StatelessGroup, TorchGroups, create_eplb_communicator
from eplb_core.errors import DecisionUnknownError, EplbError, IntegrityError, TransferError
from eplb_sglang import choice
from eplb_sglang.survivors import EMPTY, Placement, columns, every_expert_remains, without_lost

START_TIMEOUT_S = 600.0
"""How long the ranks wait for one another to make a communicator, unless the config string says it, in seconds: some
may load their weights minutes longer than others."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the slots.

    Attributes:
        coordinator: what a communicator is made for: the ranks that are alive, in order.
        alive: their numbers among all ranks that SGLang's placements speak of.
        node_of_rank: node of each rank that is alive, or None where all share one.
    """

    coordinator: TorchGroups | StatelessGroup
    alive: tuple[int, ...]
    node_of_rank: tuple[int, ...] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.coordinator.rank_in_group == 0


@dataclass(frozen=True, slots=True)
class Moved:
    """What a rearrangement did.

    Attributes:
        result: eplb's own account.
        missing: layer -> experts that no rank that is alive holds and that this rank's slots are to hold, sorted.
    """

    result: RearrangeResult
    missing: dict[int, list[int]]


class RearrangementFailedError(Exception):
    """A rearrangement failed, and all ranks that are alive know what their slots hold: SGLang can serve on.

    Attributes:
        placement: int64 `[layers, slots]` in SGLang's numbering, -1 for slots that hold no expert.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__("a rearrangement failed")
        self.placement = placement


class ExpertMover:
    """Moves the experts of one model between the ranks of one group. Every rank makes one, at the same time.

    Args:
        config: the config string of the backend.
        weights: layer -> its tensors, first dimension = local slots, as SGLang's models offer them.
        group: the ranks.

    Raises:
        EplbError: as `eplb_core.create_eplb_communicator` and `eplb_core.Rearranger`.
    """

    def __init__(self, config: str, weights: Mapping[int, Sequence[torch.Tensor]], group: Group) -> None:
        self.layers = sorted(weights)
        self.alive = group.alive
        self.group = group
        self._marks = _marks(weights)
        self._filled_by_sglang = False
        tensors = [[tensor.detach() for tensor in weights[layer]] for layer in self.layers]
        self.slots_per_rank = tensors[0][0].shape[0]
        self.nbytes = sum(tensor.nbytes for layer in tensors for tensor in layer)
        self._communicator = create_eplb_communicator(
            group.coordinator, config, tensors[0], arguments=choice.patience(config, START_TIMEOUT_S)
        )
        try:
            self._rearranger = Rearranger(self._communicator, tensors, node_of_rank=group.node_of_rank)
        except BaseException:
            self._communicator.close()
            raise

    @property
    def config(self) -> str:
        """The config string of the backend that is used, with what it stands for."""
        return self._communicator.binding.config

    @property
    def window_bytes(self) -> int:
        """Bytes of the window."""
        return self._rearranger.window_bytes

    def fits(self, weights: Mapping[int, Sequence[torch.Tensor]], alive: Sequence[int]) -> bool:
        """Return whether this moves these tensors, and between these ranks."""
        return tuple(alive) == self.alive and _marks(weights) == self._marks

    def move(self, old: Placement, new: Placement, layers: Sequence[int], *, verify: bool = False) -> Moved:
        """Move some layers from placement `old` to `new`; what they say of other layers does not matter.

        An expert that any rank that is alive holds comes from there, from the nearest that is least busy.

        Args:
            old: int64 `[layers of the model, slots of all ranks]`, -1 for slots that hold no expert.
            new: the same shape.
            layers: which.
            verify: compare checksums of all experts before and after.

        Raises:
            RearrangementFailedError: it failed, and SGLang can serve on.
            EplbError: it failed, and SGLang cannot.
        """
        here = columns(self.alive, self.slots_per_rank)
        rows = np.array(self.layers, np.int64)
        before = np.ascontiguousarray(old[rows[:, None], here])
        wanted = before.copy()
        chosen = [self.layers.index(layer) for layer in layers]
        wanted[chosen] = new[np.array(layers, np.int64)[:, None], here]
        after, lost = without_lost(before, wanted)
        try:
            result = self._rearranger.run(
                before, after, weights_changed=self._filled_by_sglang, verify="full" if verify else "off"
            )
        except TransferError as error:
            held = error.placement
            agreed = not isinstance(error, (DecisionUnknownError, IntegrityError))
            if held is None or not agreed or len(lost) or not every_expert_remains(before, held):
                raise
            whole = np.full_like(old, EMPTY)
            whole[rows[:, None], here] = held
            raise RearrangementFailedError(whole) from error
        self._filled_by_sglang = len(lost) > 0  # SGLang reads them next, which the rearranger does not know of
        rank = self.group.coordinator.rank_in_group
        missing: dict[int, set[int]] = {}
        for layer, slot, expert in lost.tolist():
            if slot // self.slots_per_rank == rank:
                missing.setdefault(self.layers[layer], set()).add(expert)
        return Moved(result, {layer: sorted(experts) for layer, experts in missing.items()})

    def close(self) -> None:
        """Release everything; may be called twice."""
        with contextlib.suppress(EplbError):
            self._communicator.close()


def _marks(weights: Mapping[int, Sequence[torch.Tensor]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return what tells these tensors from others: where they lie, and how they look."""
    return [(layer, tensor.data_ptr(), tuple(tensor.shape)) for layer in sorted(weights) for tensor in weights[layer]]
