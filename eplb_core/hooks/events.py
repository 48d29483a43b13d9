"""The events that hooks receive: one small value for each thing that happens to a transfer or a rearrangement.

An event is delivered later and on another thread, so it holds plain values only: no tensor, no array, and no traceback
or other part of an error that would keep the frames of the transfer, and their tensors, alive.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any, Final

from eplb_core.contract.stats import TransferStats

_SCALARS: Final = (str, int, float, bool, type(None))
_OF_THE_SYSTEM: Final = ("errno", "strerror", "filename", "filename2")  # what an OSError holds besides its arguments
_MOST_ITEMS: Final = 4096  # of a container in an error's attribute; longer ones are omitted


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferEvent:
    """The fields of all transfer events.

    Attributes:
        backend: the backend's name.
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        bytes_sent: payload bytes queued to leave this rank.
        bytes_received: payload bytes queued to reach this rank.
        messages: tensors queued, both ways.
        bytes_sent_to: peer rank -> payload bytes queued for it.
        bytes_received_from: peer rank -> payload bytes queued from it.
        time_s: when it happened, in seconds since the epoch; hooks run later.
    """

    backend: str
    rank: int
    world_size: int
    bytes_sent: int
    bytes_received: int
    messages: int
    bytes_sent_to: Mapping[int, int] = field(default_factory=dict)
    bytes_received_from: Mapping[int, int] = field(default_factory=dict)
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStarted(TransferEvent):
    """`execute()` or `start()` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFinished(TransferEvent):
    """`execute()` is about to return.

    Attributes:
        stats: what it did.
        staging_bytes: bytes of memory that the transport holds for staging on this rank.
    """

    stats: TransferStats
    staging_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed(TransferEvent):
    """`execute()` is about to raise.

    Attributes:
        error: a copy of the error that is raised, as `detached` makes it.
    """

    error: BaseException

    def __post_init__(self) -> None:
        """Keep a copy of the error that keeps nothing else alive."""
        object.__setattr__(self, "error", detached(self.error))


@dataclass(frozen=True, slots=True, kw_only=True)
class RearrangeEvent:
    """The fields of all rearrangement events.

    Attributes:
        backend: the name of the communicator's backend.
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        time_s: when it happened, in seconds since the epoch; hooks run later.
    """

    backend: str
    rank: int
    world_size: int
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class RearrangeStarted(RearrangeEvent):
    """All ranks have the same plan, and the first step is about to start.

    Attributes:
        bytes_to_receive: payload bytes that will reach this rank, in all steps together.
        bytes_to_send: payload bytes that will leave it.
        steps: how many steps there are.
        layers: how many layers the placements have.
        background: whether it runs beside inference, on a separate thread.
    """

    bytes_to_receive: int
    bytes_to_send: int
    steps: int
    layers: int
    background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted(RearrangeEvent):
    """A step is committed: the slots of this rank match the placement after it.

    Attributes:
        step: the number of the step; the first one is 0.
        steps: how many steps there are.
        layers: the layers that the step changed, sorted.
        bytes_received: payload bytes that reached this rank in the step.
        peers: ranks that this rank exchanged experts with in the step, sorted.
        seconds: wall time from the start of its transfer to the end of its commit.
    """

    step: int
    steps: int
    layers: tuple[int, ...]
    bytes_received: int
    peers: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RearrangeFinished(RearrangeEvent):
    """The weights of this rank match the new placement.

    Attributes:
        seconds: wall time of the whole rearrangement on this rank.
        moved: experts that crossed from one rank to another, in all layers and all ranks together.
        bytes_received: payload bytes that reached this rank.
        steps: how many steps it took.
        phases: phase name -> seconds on this rank.
        staging_bytes: bytes of staging memory of this rank, window and transport together.
    """

    seconds: float
    moved: int
    bytes_received: int
    steps: int
    phases: Mapping[str, float] = field(default_factory=dict)
    staging_bytes: int = 0

    def __post_init__(self) -> None:
        """Keep the phases as they are now."""
        object.__setattr__(self, "phases", dict(self.phases))


@dataclass(frozen=True, slots=True, kw_only=True)
class RearrangeFailed(RearrangeEvent):
    """The rearrangement stopped before its end.

    Attributes:
        error: a copy of the error that is raised, as `detached` makes it.
        seconds: wall time on this rank until it failed.
        step: the first step that is not committed, or None if it failed before the first.
    """

    error: BaseException
    seconds: float
    step: int | None = None

    def __post_init__(self) -> None:
        """Keep a copy of the error that keeps nothing else alive."""
        object.__setattr__(self, "error", detached(self.error))


Event = TransferEvent | RearrangeEvent

HOOK_OF_EVENT: Final[Mapping[type[Event], str]] = {
    TransferStarted: "eplb_transfer_started",
    TransferFinished: "eplb_transfer_finished",
    TransferFailed: "eplb_transfer_failed",
    RearrangeStarted: "eplb_rearrange_started",
    StepCommitted: "eplb_step_committed",
    RearrangeFinished: "eplb_rearrange_finished",
    RearrangeFailed: "eplb_rearrange_failed",
}
"""Event class -> the hook that receives it."""


def detached(error: BaseException) -> BaseException:
    """Return an error of the same class and text without traceback, cause and context.

    Attributes that are plain values (`peers`, `phase`, `usable`, ...) are copied. Others, such as a placement, are
    omitted; in the arguments they are replaced by the name of their type.
    """
    arguments = tuple(each if _is_plain(each) else f"<{type(each).__qualname__}>" for each in error.args)
    copy = _blank(type(error)) or RuntimeError()
    if type(copy) is not type(error):
        arguments = (f"{type(error).__qualname__}: {' '.join(map(str, arguments))}",)
    copy.args = arguments
    vars(copy).update({name: value for name, value in vars(error).items() if _is_plain(value)})
    for name in _OF_THE_SYSTEM if isinstance(error, OSError) else ():
        if (value := getattr(error, name)) is not None and _is_plain(value):
            setattr(copy, name, value)
    return copy


def _blank(kind: type[BaseException]) -> BaseException | None:
    """Return an uninitialised exception, made by the built-in class that defines its layout, without `__init__`."""
    for base in kind.__mro__:
        make = vars(base).get("__new__")
        if isinstance(make, BuiltinFunctionType):
            with contextlib.suppress(TypeError):  # another base defines its layout
                blank: BaseException = make(kind)
                return blank
    return None


def _is_plain(value: Any) -> bool:
    """Return whether it consists of text, numbers and short containers of them: a subclass could hold anything."""
    if type(value) in _SCALARS:
        return True
    if type(value) is dict:
        return len(value) <= _MOST_ITEMS and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return type(value) in (list, tuple) and len(value) <= _MOST_ITEMS and all(map(_is_plain, value))
