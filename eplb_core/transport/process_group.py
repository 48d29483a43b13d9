"""Moves messages over a torch.distributed process group, all in one batch, with one deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

from eplb_core.control.torch_timeout import torch_timeout
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.transport.coalesce import Message
from eplb_core.words import ranks_text


def exchange(group: dist.ProcessGroup, sends: Sequence[Message], recvs: Sequence[Message], timeout_s: float) -> None:
    """Pack, post all sends and receives in one batch, wait for every one, unpack.

    Ranks in the messages are ranks of `group`, which may differ from the global ones.

    Args:
        group: the process group that carries them.
        sends: what this rank sends.
        recvs: what it receives.
        timeout_s: for all of it, in seconds.

    Raises:
        TransferTimeoutError: a peer did not do its part in time.
        PeerLostError: the connection to a peer broke.
    """
    if not sends and not recvs:
        return
    for message in sends:
        message.pack()
    operations = [dist.P2POp(dist.irecv, message.payload, group=group, group_peer=message.peer) for message in recvs]
    operations += [dist.P2POp(dist.isend, message.payload, group=group, group_peer=message.peer) for message in sends]
    peers = sorted({message.peer for message in (*sends, *recvs)})
    # NCCL returns one work object for the whole batch, gloo one for each operation, in order.
    deadline = time.monotonic() + timeout_s
    try:
        works = dist.batch_isend_irecv(operations)
    except RuntimeError as error:
        raise _named(error, peers, timeout_s) from error
    for index, work in enumerate(works):
        concerned = [(*recvs, *sends)[index].peer] if len(works) == len(operations) else peers
        try:
            work.wait(torch_timeout(deadline - time.monotonic()))
        except RuntimeError as error:
            raise _named(error, concerned, timeout_s) from error
    for message in recvs:
        message.unpack()


def _named(error: RuntimeError, peers: Sequence[int], timeout_s: float) -> TransferError:
    ranks = ranks_text(peers)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return TransferTimeoutError(
            f"{ranks} did not send or receive within {timeout_s:g} s", peers=peers, phase="transfer", why=reason
        )
    return PeerLostError(f"the connection to {ranks} broke", peers=peers, phase="transfer", why=reason)
