"""The agreement between ranks: nothing is built unless every rank would build the same.

A rank that fails alone makes the others hang. So every rank announces what it would build, or why it cannot, and all
ranks compare the same answers and reach the same conclusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from eplb_core.contract.staging import DEFAULT_STAGING_BYTES
from eplb_core.control.agreement import LONGEST_TEXT, exchange
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import EplbError, HandshakeError


class Proposal(msgspec.Struct, array_like=True, frozen=True):
    """What one rank would build. Every field except `problem` and `staging` must be the same on every rank.

    Attributes:
        problem: why this rank cannot build it; empty if it can.
        backend: name of the backend.
        distribution: the distribution that registers it, with its version.
        plugin_api: the plugin API version that the backend was written for.
        options: every option with its value.
        device: device type of the tensors.
        layout: shape and dtype of each of one layer's tensors.
        staging: bytes of staging memory that it would take if the configuration does not say it.
    """

    problem: str = ""
    backend: str = ""
    distribution: str = ""
    plugin_api: str = ""
    options: str = ""
    device: str = ""
    layout: str = ""
    staging: int = DEFAULT_STAGING_BYTES


_ROWS = {
    "problem": "cannot build",
    "backend": "backend",
    "distribution": "distribution",
    "plugin_api": "plugin API",
    "options": "options",
    "device": "device",
    "layout": "expert layout",
}


def describe_layout(tensors: Sequence[torch.Tensor]) -> str:
    """Return a text of each tensor's shape and dtype, equal on all ranks with the same layout."""
    return " + ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "no tensors"


def agree(control: ControlPlane, proposal: Proposal, problem: EplbError | None, timeout_s: float) -> int:
    """Return if every rank proposes the same and none has a problem: the least staging memory that any would take.

    Args:
        control: the control plane of the group.
        proposal: this rank's.
        problem: this rank's problem as an error, or None; `proposal.problem` is its text.
        timeout_s: the longest wait for the slowest rank, in seconds.

    Raises:
        HandshakeError: the ranks differ, or one did not answer; the same table on every rank.
        EplbError: every rank has the same problem: this rank's own error.
    """
    said = exchange(control, "what each rank would build", msgspec.msgpack.encode(_cut(proposal)), timeout_s)
    try:
        proposals = [msgspec.msgpack.decode(value, type=Proposal) for value in said]
    except UNREADABLE as error:
        raise HandshakeError(
            "a rank uses another version of the handshake",
            table={},
            why=str(error),
            remedy="install the same eplb on every rank",
        ) from error
    if problem is not None and len({rank.problem for rank in proposals}) == 1:
        raise problem
    table = {}
    for name, row in _ROWS.items():
        values = [getattr(rank, name) for rank in proposals]
        if name == "problem":
            differs = any(values)
            values = [value or "-" for value in values]
        else:
            # Ranks with a problem may not have got this far.
            differs = len({v for v, rank in zip(values, proposals, strict=True) if v or not rank.problem}) > 1
            values = [value or "?" for value in values]
        if differs:
            table[row] = values
    if table:
        raise HandshakeError(
            "the ranks do not agree on the communicator", table=table, remedy="make these the same on every rank"
        ) from problem
    return min(rank.staging for rank in proposals)


def _cut(proposal: Proposal) -> Proposal:
    values = {name: getattr(proposal, name)[:LONGEST_TEXT] for name in _ROWS}
    return Proposal(**values, staging=proposal.staging)
