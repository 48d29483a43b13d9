"""The location of each rank: all ranks must be processes of one host whose GPUs can read each other's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from eplb_core import BackendContext
from eplb_core.control.agreement import Answer, all_say
from eplb_core.errors import BackendUnavailableError, ControlPlaneError
from eplb_core.transport import HostIdentity, as_transfer_error
from eplb_cuda_ipc.memory import Memory


class Card(msgspec.Struct, array_like=True, frozen=True):
    """What a rank sends to every other one before they connect.

    Attributes:
        host: an identifier of the host's kernel since it was booted.
        pid_namespace: of its process ids; CUDA finds the owner of a handle by its process id.
        net_namespace: of its sockets.
        process: its process id.
        gpu: its device.
        address: where it listens.
        sample: bytes that it writes into its window, so that the others can check that they read them.
    """

    host: str
    pid_namespace: int
    net_namespace: int
    process: int
    gpu: str
    address: bytes
    sample: bytes


def card_of_this_process(gpu: str, address: bytes, sample: bytes) -> Card:
    """Return this process's card."""
    here = HostIdentity.here()
    return Card(
        host=here.boot,
        pid_namespace=here.pid_namespace,
        net_namespace=here.net_namespace,
        process=os.getpid(),
        gpu=gpu,
        address=address,
        sample=sample,
    )


def exchange(context: BackendContext, mine: Card, memory: Memory, timeout_s: float) -> list[Card]:
    """Return the card of every rank, in rank order, once all ranks know that they can reach one another.

    Raises:
        BackendUnavailableError: two ranks cannot; on every rank.
        TransferTimeoutError: a rank did not answer in time.
    """
    said = _answers(context, "places of cuda_ipc ranks", timeout_s, value=msgspec.msgpack.encode(mine))
    cards = [msgspec.msgpack.decode(each.value, type=Card) for each in said]
    problem = unlike(cards) or unreachable(cards, context.rank, memory)
    tell_problem(context, "whether all ranks reach one another", problem, timeout_s)
    return cards


def unlike(cards: Sequence[Card]) -> str:
    """Return why ranks at these places cannot map each other's memory, or an empty text if they can."""
    first = cards[0]
    for rank, card in enumerate(cards):
        if card.host != first.host:
            return f"rank {rank} is on another host than rank 0"
        if card.pid_namespace != first.pid_namespace:
            return (
                f"rank {rank} is in another PID namespace, such as another container, than rank 0; "
                "CUDA does not map memory across them"
            )
        if card.net_namespace != first.net_namespace:
            return f"rank {rank} is in another network namespace, such as another container, than rank 0"
        if card.process in [other.process for other in cards[:rank]]:
            return f"rank {rank} is in the same process as another rank; CUDA maps memory of other processes only"
    return ""


def unreachable(cards: Sequence[Card], rank: int, memory: Memory) -> str:
    """Return why this rank's device cannot read that of another rank, or an empty text if it can."""
    for peer, card in enumerate(cards):
        reason = memory.unreachable(card.gpu) if peer != rank and card.gpu != memory.gpu else ""
        if reason:
            return f"rank {rank} cannot read the memory of rank {peer}: {reason}"
    return ""


def tell_problem(context: BackendContext, what: str, problem: str, timeout_s: float) -> None:
    """Raise the first rank's problem on every rank; return if none has one.

    Raises:
        BackendUnavailableError: a rank has a problem.
        TransferTimeoutError: a rank did not answer in time.
    """
    answers = _answers(context, what, timeout_s, problem=problem)
    first = next((answer.problem for answer in answers if answer.problem), "")
    if first:
        raise BackendUnavailableError(
            "the ranks cannot map each other's memory",
            name="cuda_ipc",
            why=first,
            remedy="use a backend that needs no mapping, such as nixl or torch_nccl",
        )


def _answers(
    context: BackendContext, what: str, timeout_s: float, *, value: bytes = b"", problem: str = ""
) -> list[Answer]:
    """Return every rank's answer.

    Raises:
        TransferTimeoutError: a rank did not answer in time.
    """
    try:
        return all_say(context.control, what, timeout_s, value=value, problem=problem)
    except ControlPlaneError as error:
        raise as_transfer_error(error, "connect") from error
