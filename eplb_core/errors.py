"""Every error that eplb raises, in one hierarchy.

An error answers four questions for the person who meets it: what happened, where, why, and which command or setting
fixes it. Each class also derives from the built-in exception that callers of the original interface expect
(`ValueError` for a bad name, `RuntimeError` for something that cannot be built).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class EplbError(Exception):
    """The base of all errors of this package.

    Attributes:
        what: one clause that says what happened.
        where: the file, distribution, rank or column concerned, if there is one.
        why: the cause, if it is known.
        remedy: the command, setting or change that fixes it, if there is one.
    """

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, remedy: str | None = None
    ) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.remedy = remedy
        message = f"{what} ({where})" if where else what
        if why:
            message += f": {why}"
        if remedy:
            message += f"\n  hint: {remedy}"
        # Names of files and text of others may hold what cannot be written: lone surrogates.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class InputError(EplbError, ValueError):
    """A file, option or array supplied by the user cannot be used."""


class PlacementError(EplbError, ValueError):
    """A placement, or a pair of them, is not valid."""


class LostExpertsError(PlacementError):
    """The new placement needs experts that no slot of the old one holds. Nothing was moved.

    Attributes:
        experts: `(layer, logical expert)` of each, sorted.
    """

    _MOST_NAMED = 8

    def __init__(self, experts: Iterable[tuple[int, int]]) -> None:
        self.experts: tuple[tuple[int, int], ...] = tuple(sorted(experts))
        count = f"{len(self.experts)} logical expert" + ("" if len(self.experts) == 1 else "s")
        named = ", ".join(f"{expert} in layer {layer}" for layer, expert in self.experts[: self._MOST_NAMED])
        more = len(self.experts) - self._MOST_NAMED
        super().__init__(
            f"the new placement needs {count} that no slot holds: {named}" + (f", and {more} more" if more > 0 else ""),
            why="weights can only be moved from a slot of the old placement",
            remedy="give Rearranger.run a loader that reads these experts from a checkpoint, "
            "or omit them from the new placement",
        )


class PolicyError(EplbError, ValueError):
    """A balance policy cannot be selected: unknown, registered twice, or broken.

    Attributes:
        name: the requested name.
    """

    def __init__(
        self, what: str, *, name: str, where: str | None = None, why: str | None = None, remedy: str | None = None
    ) -> None:
        self.name = name
        super().__init__(what, where=where, why=why, remedy=remedy)


# --- selecting a backend ---------------------------------------------------------------------------------------------


class ConfigError(EplbError, ValueError):
    """A config string is malformed, or an option in it is invalid.

    Attributes:
        text: the config string, where there is one.
        column: 1-based column of the first wrong character, or None.
    """

    def __init__(
        self,
        what: str,
        *,
        text: str | None = None,
        column: int | None = None,
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.text = text
        self.column = column
        if where is None and text is not None:
            where = f"column {column} of {text!r}" if column is not None else f"in {text!r}"
        super().__init__(what, where=where, why=why, remedy=remedy)


class BackendError(EplbError):
    """A backend cannot be selected. `name` is the requested name."""

    def __init__(
        self,
        what: str,
        *,
        name: str,
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.name = name
        super().__init__(what, where=where, why=why, remedy=remedy)


class UnknownBackendError(BackendError, ValueError):
    """No installed distribution registers a backend of this name, and eplb knows none that would."""


class BackendNotInstalledError(BackendError, RuntimeError):
    """The backend is known, but it or a package it needs is not installed."""


class BackendBrokenError(BackendError, RuntimeError):
    """The backend is installed, but it cannot be imported, or its spec cannot be read."""


class BackendConflictError(BackendError, ValueError):
    """Two distributions register this name, and the config string does not select one."""


class BackendVersionError(BackendError, RuntimeError):
    """The backend was written for a plugin API that this version of eplb does not support."""


class BackendUnavailableError(BackendError, RuntimeError):
    """The backend is installed, but it cannot work here: wrong device, wrong group, or its probe failed."""


class StatelessGroupError(BackendUnavailableError, ValueError):
    """The backend needs a torch.distributed process group, but the group is stateless."""


class NotACommunicatorError(BackendError, TypeError):
    """The backend's factory returned something that is not an `EplbCommunicator`."""


# --- ranks that disagree ---------------------------------------------------------------------------------------------


class HandshakeError(EplbError, RuntimeError):
    """The ranks of a group do not agree on what to build. Every rank raises it, with the same table.

    Attributes:
        table: the item that differs -> the value of each rank, in rank order.
        missing: ranks that did not answer, sorted.
        placement: what the slots hold, int64 `[layers, slots]`, in a rearrangement: nothing was moved.
    """

    placement: npt.NDArray[np.int64] | None = None

    def __init__(
        self,
        what: str,
        *,
        table: Mapping[str, Sequence[str]],
        missing: Sequence[int] = (),
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.table: dict[str, list[str]] = {item: list(values) for item, values in table.items()}
        self.missing: tuple[int, ...] = tuple(sorted(missing))
        lines = [
            f"\n  {item}: " + ", ".join(f"rank {rank} = {value}" for rank, value in enumerate(values))
            for item, values in self.table.items()
        ]
        super().__init__(what + "".join(lines), why=why, remedy=remedy)


class ControlPlaneError(EplbError, RuntimeError):
    """The control messages between ranks did not get through in time.

    Attributes:
        missing: group ranks that did not answer, sorted; empty if unknown.
        placement: what the slots hold, int64 `[layers, slots]`, if it was in a rearrangement.
    """

    placement: npt.NDArray[np.int64] | None = None

    def __init__(
        self,
        what: str,
        *,
        missing: Sequence[int] = (),
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.missing: tuple[int, ...] = tuple(sorted(missing))
        super().__init__(what, where=where, why=why, remedy=remedy)


# --- moving bytes ----------------------------------------------------------------------------------------------------


class InvalidTransferError(EplbError, ValueError):
    """`add_send` or `add_recv` refused a tensor or a rank. Nothing was queued."""


class CommunicatorClosedError(EplbError, RuntimeError):
    """The communicator was closed, or a failure left it unusable."""


class TransferError(EplbError, RuntimeError):
    """`execute()` did not finish. Sent tensors are untouched, received ones undefined, the queue is empty.

    Attributes:
        peers: group ranks concerned, sorted.
        phase: the step of the transfer that failed, in one word ("agree", "pack", "read", ...).
        usable: whether the same communicator may be used again.
        placement: what the slots hold, int64 `[layers, slots]`, in a rearrangement: the same on every surviving rank.
    """

    placement: npt.NDArray[np.int64] | None = None

    def __init__(
        self,
        what: str,
        *,
        peers: Iterable[int] = (),
        phase: str = "",
        usable: bool = False,
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.peers: tuple[int, ...] = tuple(sorted(peers))
        self.phase = phase
        self.usable = usable
        super().__init__(what, where=where, why=why, remedy=remedy)


class TransferMismatchError(TransferError):
    """A send and its receive differ in count, size or dtype. No byte moved."""


class TransferOverflowError(TransferError):
    """More bytes were queued than the communicator's window holds. No byte moved."""


class TransferTimeoutError(TransferError, TimeoutError):
    """A peer did not do its part within the timeout."""


class PeerLostError(TransferError, ConnectionError):
    """A peer is gone."""


class IntegrityError(TransferError):
    """The bytes that arrived are not the bytes that were sent.

    Attributes:
        wrong: pairs of source rank and index, among the receives with bytes from that rank, in the order queued.
        experts: `(layer, expert, source rank)` of each, sorted, in a rearrangement.
    """

    experts: tuple[tuple[int, int, int], ...] = ()

    def __init__(
        self,
        what: str,
        *,
        wrong: Sequence[tuple[int, int]] = (),
        peers: Iterable[int] = (),
        phase: str = "verify",
        usable: bool = False,
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.wrong: list[tuple[int, int]] = list(wrong)
        super().__init__(what, peers=peers, phase=phase, usable=usable, where=where, why=why, remedy=remedy)


class DecisionUnknownError(TransferError):
    """The store died while a step was being decided: other ranks may or may not have committed it.

    `placement` is what the slots hold, with -1 in every slot, on any rank, that the step would have changed.
    """


class LoaderError(EplbError, RuntimeError):
    """A rank's loader did not supply the experts that no rank holds.

    Attributes:
        experts: `(layer, expert)` of each expert still missing, sorted.
        placement: what the slots hold, int64 `[layers, slots]`, with -1 in the slots of these experts.
    """

    def __init__(
        self, what: str, *, experts: Iterable[tuple[int, int]], placement: npt.NDArray[np.int64], why: str
    ) -> None:
        self.experts: tuple[tuple[int, int], ...] = tuple(sorted(set(experts)))
        self.placement = placement
        super().__init__(what, why=why, remedy="fix the loader, and rearrange from error.placement")
