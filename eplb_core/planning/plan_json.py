"""Plans as JSON: written exactly, and read with nothing taken on trust."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.errors import InputError, PlacementError
from eplb_core.planning.placement import EMPTY, check_pair
from eplb_core.planning.plan import RearrangementPlan

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Vector = list[_Int64]
_Rows = list[_Vector]


class _Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A plan as it is written; the fields are those of `RearrangementPlan`."""

    format: Literal["eplb-plan/1"] = "eplb-plan/1"
    num_ranks: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    old: _Rows
    new: _Rows
    node_of_rank: _Vector
    transfer_layer: _Vector
    transfer_expert: _Vector
    transfer_src_rank: _Vector
    transfer_src_slot: _Vector
    transfer_dst_rank: _Vector
    transfer_after: _Vector
    move_layer: _Vector
    move_rank: _Vector
    move_slot: _Vector
    move_transfer: _Vector
    move_source: _Vector
    lost: list[tuple[_Int64, _Int64, _Int64]]


_VECTORS = [name for name in _Document.__struct_fields__ if name.startswith(("node_", "transfer_", "move_"))]


def encode_plan(plan: RearrangementPlan) -> str:
    """Return the plan as JSON text."""
    arrays = {name: getattr(plan, name).tolist() for name in [*_VECTORS, "old", "new", "lost"]}
    return msgspec.json.encode(_Document(num_ranks=plan.num_ranks, **arrays)).decode()


def decode_plan(text: str | bytes) -> RearrangementPlan:
    """Read a plan, and check that it turns its old placement into its new one.

    Raises:
        InputError: the text is not a plan.
        PlacementError: its placements are not valid, or its transfers and moves do not fit them.
    """
    try:
        document = msgspec.json.decode(text, type=_Document)
    except msgspec.ValidationError as error:
        raise InputError("this is not a rearrangement plan", why=str(error)) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InputError("this is not a rearrangement plan", why=f"not JSON: {error}") from error
    old, new = check_pair(document.old, document.new, document.num_ranks)
    vectors = {name: np.array(getattr(document, name), dtype=np.int64) for name in _VECTORS}
    lost = np.array(document.lost, dtype=np.int64).reshape(-1, 3)
    plan = RearrangementPlan(num_ranks=document.num_ranks, old=old, new=new, lost=lost, **vectors)
    _check_ranges(plan)
    _check_result(plan)
    _check_relays(plan)
    _check_lost(plan)
    return plan


def _check_ranges(plan: RearrangementPlan) -> None:
    """Check that all columns are complete, and that what they name exists."""
    per_rank, num_layers = plan.slots_per_rank, plan.num_layers
    bounds = {
        "node_of_rank": (-(2**63), 2**63),
        "transfer_layer": (0, num_layers),
        "transfer_expert": (0, 2**31),
        "transfer_src_rank": (0, plan.num_ranks),
        "transfer_src_slot": (0, per_rank),
        "transfer_dst_rank": (0, plan.num_ranks),
        "transfer_after": (-1, plan.num_transfers),
        "move_layer": (0, num_layers),
        "move_rank": (0, plan.num_ranks),
        "move_slot": (0, per_rank),
        "move_transfer": (-1, plan.num_transfers),
        "move_source": (-1, per_rank),
    }
    for name, (least, bound) in bounds.items():
        values: IntArray = getattr(plan, name)
        length = {"n": plan.num_ranks, "t": plan.num_transfers, "m": plan.num_moves}[name[0]]
        if len(values) != length:
            raise PlacementError(f"{name!r} of the plan has {len(values)} values instead of {length}")
        if len(values) and not least <= int(values.min()) <= int(values.max()) < bound:
            raise PlacementError(f"{name!r} of the plan has a value outside of {least} to {bound - 1}")
    for name in ("transfer_layer", "move_layer"):
        if bool((np.diff(getattr(plan, name)) < 0).any()):
            raise PlacementError(f"{name!r} of the plan is not sorted")


def _check_result(plan: RearrangementPlan) -> None:
    """Check that transfers and moves read what they say, and together make the new placement."""
    per_rank = plan.slots_per_rank
    source = plan.transfer_src_rank * per_rank + plan.transfer_src_slot
    # A relayed transfer reads what the one before it brought.
    read = np.where(
        plan.transfer_after >= 0, plan.new[plan.transfer_layer, source], plan.old[plan.transfer_layer, source]
    )
    remote = plan.move_transfer >= 0
    index = plan.move_transfer[remote]
    slot = plan.move_rank * per_rank + plan.move_slot
    moved = np.full(plan.num_moves, EMPTY)
    moved[remote] = plan.transfer_expert[index]
    moved[~remote] = plan.old[plan.move_layer[~remote], plan.move_rank[~remote] * per_rank + plan.move_source[~remote]]
    result = np.where(plan.new == EMPTY, EMPTY, plan.old)
    result[plan.move_layer, slot] = moved
    consistent = (
        np.array_equal(read, plan.transfer_expert)
        and bool((plan.transfer_src_rank != plan.transfer_dst_rank).all())
        and bool(((plan.move_source < 0) == remote).all())
        and len(np.unique(plan.move_layer * plan.new.shape[1] + slot)) == plan.num_moves
        and np.array_equal(np.unique(index), np.arange(plan.num_transfers))
        and np.array_equal(plan.transfer_layer[index], plan.move_layer[remote])
        and np.array_equal(plan.transfer_dst_rank[index], plan.move_rank[remote])
        and np.array_equal(result, plan.new)
    )
    if not consistent:
        raise PlacementError("the transfers and moves of the plan do not turn its old placement into its new one")


def _check_relays(plan: RearrangementPlan) -> None:
    """Check that every relayed transfer reads a slot that the transfer before it fills."""
    relayed = np.flatnonzero(plan.transfer_after >= 0)
    before = plan.transfer_after[relayed]
    filled = np.stack([plan.move_layer, plan.move_transfer, plan.move_slot], axis=1).tolist()
    read = np.stack([plan.transfer_layer[relayed], before, plan.transfer_src_slot[relayed]], axis=1).tolist()
    consistent = (
        bool((plan.transfer_after[before] < 0).all())
        and np.array_equal(plan.transfer_dst_rank[before], plan.transfer_src_rank[relayed])
        and set(map(tuple, read)) <= set(map(tuple, filled))
    )
    if not consistent:
        raise PlacementError(
            "a relayed transfer of the plan does not read what another transfer brought",
            why="'transfer_after' names the transfer whose slot it reads, and that one is not relayed itself",
        )


def _check_lost(plan: RearrangementPlan) -> None:
    """Check that what is lost are empty slots of the new placement, and experts without a copy."""
    layer, slot, expert = plan.lost.T
    inside = (layer >= 0) & (layer < plan.num_layers) & (slot >= 0) & (slot < plan.new.shape[1]) & (expert >= 0)
    if not (
        inside.all()
        and (plan.new[layer, slot] == EMPTY).all()
        and not (plan.old[layer] == expert[:, None]).any()
        and len(np.unique(layer * plan.new.shape[1] + slot)) == len(layer)
    ):
        raise PlacementError("'lost' names a slot that is not left empty, or an expert that has a copy")
