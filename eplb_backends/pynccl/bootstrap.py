"""Finds or makes the NCCL communicator that carries the bytes, of the same kind on every rank."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import cast

from eplb_backends.pynccl.options import PyNcclOptions
from eplb_backends.pynccl.transport import (
    UNIQUE_ID_BYTES,
    EngineCommunicator,
    EngineTransport,
    OwnTransport,
    Transport,
)
from eplb_core.contract.context import BackendContext
from eplb_core.control.agreement import Answer, all_say, failed_ranks
from eplb_core.errors import BackendError, BackendNotInstalledError, BackendUnavailableError, ControlPlaneError

_ENGINE = b"engine"
_OWN = b"own"


def open_transport(context: BackendContext, options: PyNcclOptions) -> Transport:
    """Return the engine's communicator, or one of our own. Every rank must call it.

    Raises:
        BackendNotInstalledError: nccl4py is needed, but not installed.
        BackendUnavailableError: the engine's communicator is not usable, the ranks have different ones, or NCCL does
            not connect them.
    """
    timeout_s = float(options.timeout)
    problem: BackendError | None = None
    message = b""
    engine: EngineCommunicator | None = None
    try:
        engine = _engine_communicator(context, options)
        message = _OWN if engine is None else _ENGINE
        if engine is None:
            _need_nccl4py()
            # Rank 0 alone makes the id, since it listens for the others.
            message += OwnTransport.unique_id() if context.rank == 0 else b""
    except BackendError as error:
        problem = error
    except Exception as error:  # noqa: BLE001 - nccl4py raises what it likes where there is no NCCL or no driver
        problem = _unavailable("nccl4py cannot make an NCCL communicator", f"{type(error).__name__}: {error}")
        problem.__cause__ = error
    try:
        what = "which NCCL communicator each rank uses"
        answers = all_say(context.control, what, timeout_s, value=message, problem=problem)
    except ControlPlaneError as error:
        raise _unavailable("the ranks did not agree on an NCCL communicator", str(error)) from error
    if problem is not None:
        raise problem
    said = _same_kind(answers)
    if engine is not None:
        return EngineTransport(engine)
    unique_id = said[0].removeprefix(_OWN)
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise _unavailable("rank 0 sent no NCCL id", f"{len(unique_id)} bytes where {UNIQUE_ID_BYTES} are expected")
    try:
        return OwnTransport(unique_id, context.rank, context.world_size, context.device, timeout_s)
    except Exception as error:
        raise _unavailable(
            "NCCL could not connect the ranks",
            f"{type(error).__name__}: {error}",
            remedy="set NCCL_DEBUG=WARN for details; every rank needs a separate GPU",
        ) from error


def _engine_communicator(context: BackendContext, options: PyNcclOptions) -> EngineCommunicator | None:
    """Return the engine's communicator, or None to use our own."""
    if options.communicator == "own":
        return None
    found = getattr(context.device_communicator, "pynccl_comm", None)
    if found is None:
        if options.communicator == "auto":
            return None
        raise _unavailable(
            "the group coordinator carries no NCCL communicator",
            "it has no device_communicator.pynccl_comm",
            remedy="use pynccl?communicator=own, which makes its own",
        )
    engine = cast("EngineCommunicator", found)
    if engine.disabled or not engine.available:
        raise _unavailable(
            f"the engine's NCCL communicator is {'disabled' if engine.disabled else 'not available'}",
            "according to its own attributes",
            remedy="enable it in the engine, or use pynccl?communicator=own, which makes its own",
        )
    size = getattr(engine, "world_size", context.world_size)
    rank = getattr(engine, "rank", context.rank)
    if (size, rank) != (context.world_size, context.rank):
        raise _unavailable(
            "the engine's NCCL communicator belongs to another group",
            f"it is rank {rank} of {size}, but this is rank {context.rank} of {context.world_size}",
        )
    return engine


def _need_nccl4py() -> None:
    try:
        found = importlib.util.find_spec("nccl") is not None
    except ValueError:
        found = False
    if not found:
        raise BackendNotInstalledError(
            "the group coordinator carries no NCCL communicator, and nccl4py, which could make one, is not installed",
            name="pynccl",
            remedy='pip install "eplb[nccl]"',
        )


def _same_kind(answers: Sequence[Answer]) -> list[bytes]:
    """Return the ranks' answers, if all use the same kind and none has a problem."""
    for rank in failed_ranks(answers):
        raise _unavailable(f"rank {rank} has no NCCL communicator", answers[rank].problem)
    said = [answer.value for answer in answers]
    kinds = ["engine" if message.startswith(_ENGINE) else "own" for message in said]
    if len(set(kinds)) > 1:
        raise _unavailable(
            "the ranks would use different NCCL communicators",
            ", ".join(f"rank {rank} = {kind}" for rank, kind in enumerate(kinds)),
            remedy="make the engine's communicator usable on every rank, or use pynccl?communicator=own",
        )
    return said


def _unavailable(what: str, why: str, remedy: str | None = None) -> BackendUnavailableError:
    return BackendUnavailableError(what, name="pynccl", why=why, remedy=remedy)
