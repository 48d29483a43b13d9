"""What happens when a rank does not do its part: no wait without an end, and the right rank is named."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eplb_core.errors import CommunicatorClosedError, TransferError, TransferTimeoutError
from eplb_core.testing.check import Check, expect, raised_by, skip
from eplb_core.testing.context import RankContext
from eplb_core.testing.traffic import POISON, Message, Traffic, all_pairs, exchange, ring

_TIMEOUT_S = 1.0
_KILL_TIMEOUT_S = 3.0
_PATIENCE_S = 2.0  # what a rank may need beyond the timeout


def a_rank_that_does_not_execute_is_named_within_the_timeout(context: RankContext) -> None:
    """If a rank does not take part, the others raise TransferTimeoutError with its number, within timeout + 2 s.

    `usable` then tells the truth: if it is false, every further use raises CommunicatorClosedError.
    """
    absent = context.world_size - 1
    communicator = context.fresh(timeout_s=_TIMEOUT_S, own_groups=True)
    traffic = Traffic(context, ring(context.world_size, 4096))
    traffic.queue(communicator)
    if context.rank == absent:
        for rank in range(absent):
            context.ask(f"rank {rank} is through")
        return
    began = time.monotonic()
    try:
        error: TransferError = raised_by(communicator.execute, TransferTimeoutError)
    finally:
        context.tell(f"rank {context.rank} is through")
    seconds = time.monotonic() - began
    expect(error.peers == (absent,), f"it names the ranks {error.peers}, and rank {absent} was absent")
    expect(seconds < _TIMEOUT_S + _PATIENCE_S, f"it took {seconds:.1f} s with a timeout of {_TIMEOUT_S:g} s")
    traffic.verify_sent()
    if not error.usable:
        raised_by(lambda: traffic.queue(communicator), CommunicatorClosedError)
        raised_by(communicator.execute, CommunicatorClosedError)


def nothing_lands_after_an_error_if_that_is_promised(context: RankContext) -> None:
    """With `may_land_late` False, nothing is written to receive tensors after `execute()` raised.

    Here a rank comes too late: it sends once the others have given up and use their tensors otherwise.
    """
    late = context.world_size - 1
    communicator = context.fresh(timeout_s=_TIMEOUT_S, own_groups=True)
    if communicator.may_land_late:
        skip("it does not promise that")
    traffic = Traffic(context, ring(context.world_size, 4096))
    traffic.queue(communicator)
    if context.rank == late:
        for rank in range(late):
            context.ask(f"rank {rank} has given up")
        with contextlib.suppress(TransferError):
            communicator.execute()
        context.tell("the late one is through")
        return
    try:
        raised_by(communicator.execute, TransferError)
    finally:
        context.tell(f"rank {context.rank} has given up")
    for part in traffic.recvs:
        part.tensor.fill_(POISON)
    context.ask("the late one is through")
    communicator.close()
    traffic.verify_nothing_arrived()


def memory_that_runs_out_in_the_middle_closes_the_communicator(context: RankContext) -> None:
    """A rank whose memory runs out amid a transfer raises a TransferError; unless that is usable, it is closed.

    Nothing else may leave `execute()`, and nobody waits beyond the timeout. Here torch has no memory left for whatever
    the last rank asks of it inside `execute()`.
    """
    poor = context.world_size - 1
    communicator = context.fresh(timeout_s=_TIMEOUT_S, own_groups=True)
    dtype = getattr(torch, (context.subject.dtypes or ("float32",))[0])
    pairs = all_pairs(context.world_size)
    traffic = Traffic(context, [Message(*pair, nbytes, dtype) for pair in pairs for nbytes in (1024, 1024, 1 << 20)])
    traffic.queue(communicator)
    context.meet("all have queued")
    memory = _NoMemory() if context.rank == poor else None
    error: TransferError | None = None
    began = time.monotonic()
    try:
        with memory or contextlib.nullcontext():
            communicator.execute()
    except TransferError as raised:
        error = raised
    except Exception as raised:  # noqa: BLE001 - which one it is, is the finding
        expect(False, f"execute() raised {type(raised).__name__}, not a TransferError: {raised}")
    seconds = time.monotonic() - began
    expect(seconds < _TIMEOUT_S + _PATIENCE_S, f"it took {seconds:.1f} s with a timeout of {_TIMEOUT_S:g} s")
    if memory is not None:
        context.tell("torch was asked", str(memory.asked))
    if context.ask("torch was asked") != "True":
        skip("execute() asks torch for nothing")
    traffic.verify_sent()
    if error is None:
        traffic.verify_received()
    elif not error.usable:
        raised_by(lambda: traffic.queue(communicator), CommunicatorClosedError)
        raised_by(communicator.execute, CommunicatorClosedError)


class _NoMemory(TorchFunctionMode):
    """Inside the block, on this thread, torch raises `OutOfMemoryError` for all that may take memory."""

    asked = False
    _FREE = frozenset({"__get__", "__set__", "data_ptr", "numel", "dim", "is_contiguous", "stride", "element_size"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise, unless the function only looks at a tensor."""
        module = getattr(func, "__module__", None) or ""
        if getattr(func, "__name__", "") in self._FREE or "profiler" in str(func) or module == "torch.overrides":
            return func(*args, **(kwargs or {}))
        self.asked = True
        raise torch.OutOfMemoryError("out of memory, says the conformance kit")


def a_killed_rank_is_named_by_every_survivor(context: RankContext) -> None:
    """A rank killed amid transfers makes every survivor raise a TransferError with its number, within timeout + 2 s."""
    victim = context.world_size - 1
    communicator = context.fresh(timeout_s=_KILL_TIMEOUT_S)
    exchange(context, communicator, ring(context.world_size, 1 << 20))
    context.meet("all work")
    if context.rank == victim:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    ends = time.monotonic() + 20.0
    traffic = Traffic(context, ring(context.world_size, 4 << 20))
    while True:
        began = time.monotonic()
        expect(began < ends, "transfers with a dead rank go on succeeding")
        traffic.queue(communicator)
        try:
            communicator.execute()
        except TransferError as error:
            seconds = time.monotonic() - began
            expect(victim in error.peers, f"it names the ranks {error.peers}, not {victim}: {error}")
            expect(seconds < _KILL_TIMEOUT_S + _PATIENCE_S, f"it took {seconds:.1f} s, timeout {_KILL_TIMEOUT_S:g} s")
            break
    traffic.verify_sent()


def a_stopped_rank_holds_nobody_up_beyond_the_timeout(context: RankContext) -> None:
    """While a rank is stopped amid transfers, the others raise a TransferError within timeout + 2 s."""
    victim = context.world_size - 1
    communicator = context.fresh(timeout_s=_KILL_TIMEOUT_S, own_groups=True)
    exchange(context, communicator, ring(context.world_size, 1 << 20))
    context.tell(f"process {context.rank}", str(os.getpid()))
    victim_process = int(context.ask(f"process {victim}"))
    context.meet("all work")
    if context.rank == 0:
        threading.Timer(0.1, os.kill, (victim_process, signal.SIGSTOP)).start()
    traffic = Traffic(context, ring(context.world_size, 4 << 20))
    ends = time.monotonic() + 20.0
    try:
        while True:
            began = time.monotonic()
            expect(began < ends, "transfers with a stopped rank go on succeeding")
            traffic.queue(communicator)
            communicator.execute()
    except TransferError:
        seconds = time.monotonic() - began
        late = seconds >= _KILL_TIMEOUT_S + _PATIENCE_S and context.rank != victim
        expect(not late, f"it took {seconds:.1f} s, timeout {_KILL_TIMEOUT_S:g} s")
    finally:
        if context.rank != victim:
            context.meet("all but the stopped one failed", range(victim))
            os.kill(victim_process, signal.SIGCONT)
    traffic.verify_sent()


CHECKS = (
    Check(a_rank_that_does_not_execute_is_named_within_the_timeout, deadline_s=12.0),
    Check(nothing_lands_after_an_error_if_that_is_promised, deadline_s=12.0),
    Check(memory_that_runs_out_in_the_middle_closes_the_communicator, deadline_s=12.0),
    Check(a_killed_rank_is_named_by_every_survivor, least_ranks=3, kills=True),
    Check(a_stopped_rank_holds_nobody_up_beyond_the_timeout, least_ranks=3, thorough=True),
)
"""The checks of this module."""
