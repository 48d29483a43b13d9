"""Memory that the ranks of one host share, and that outlives any of them: as long as one rank is there, all of it is.

It has no name in any file system (`memfd_create`), so that nothing is left of it when the last rank is gone, however
that ends. Ranks find it through `/proc` if they are of one host, PID namespace and user.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from eplb_core.control.agreement import all_answer
from eplb_core.control.nameless import NamelessMemory, open_memory
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import HandshakeError

logger = logging.getLogger(__name__)


class _Offer(msgspec.Struct, array_like=True, frozen=True):
    path: str = ""
    nonce: bytes = b""


def hosts_of_ranks(control: ControlPlane, timeout_s: float) -> list[int]:
    """Return the number of each rank's host, counted from 0 in rank order: those of one number may share memory.

    Raises:
        HandshakeError: a rank did not answer.
    """
    answers = all_answer(control, "which host each rank is on", timeout_s, value=_host().encode())
    names = [answer.value or f"rank {rank}".encode() for rank, answer in enumerate(answers)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def share_memory(
    control: ControlPlane, hosts: Sequence[int], nbytes: Sequence[int], rank: int, timeout_s: float
) -> torch.Tensor | None:
    """Return the memory that the ranks of this rank's host share, uint8 `[bytes]`, all zeros.

    Args:
        control: the control plane of the ranks; every rank calls this.
        hosts: the number of each rank's host.
        nbytes: bytes of each host's memory.
        rank: this rank.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Returns:
        The memory, or None on every rank if any of them cannot open its host's.

    Raises:
        HandshakeError: a rank did not answer, or a host has too little memory.
    """
    mine, leader = hosts[rank], list(hosts).index(hosts[rank])
    own: NamelessMemory | None = None
    problem: OSError | None = None
    if rank == leader:
        try:
            own = NamelessMemory("eplb-host-backup", nbytes[mine], reserve=True)
        except OSError as error:
            problem = error
    offer = _Offer() if own is None else _Offer(own.path, own.nonce)
    try:
        said = all_answer(
            control, "the memory of each host", timeout_s, value=msgspec.msgpack.encode(offer), problem=problem
        )
        failed = {f"rank {number}": [answer.problem] for number, answer in enumerate(said) if answer.problem}
        if failed:
            raise HandshakeError(
                f"the experts that a host keeps need up to {max(nbytes) / 2**30:.1f} GiB of its memory",
                table={},
                why="; ".join(f"{name}: {texts[0]}" for name, texts in failed.items()),
                remedy="give the containers more memory, or keep fewer copies",
            )
        memory = own.memory if own is not None else _open(said[leader].value, nbytes[mine])
        answers = all_answer(control, "who has opened the memory", timeout_s, value=b"no" if memory is None else b"yes")
    finally:
        if own is not None:
            own.close_file()
    if memory is None or any(answer.value != b"yes" for answer in answers):
        return None
    with torch.inference_mode(False):  # an engine may have turned it on, and may refresh the weights without it
        return torch.frombuffer(memory, dtype=torch.uint8)[: nbytes[mine]]


def pin(memory: torch.Tensor) -> bool:
    """Let a GPU copy from and to this memory directly, as long as the tensor is there; return whether it can."""
    if not memory.numel():
        return True
    runtime = torch.cuda.cudart()
    pointer, nbytes = memory.data_ptr(), memory.numel()
    failed = int(runtime.cudaHostRegister(pointer, nbytes, 0))
    if failed:
        logger.warning("%d bytes of host memory cannot be pinned (CUDA error %d): copies are slower", nbytes, failed)
        return False
    weakref.finalize(memory, runtime.cudaHostUnregister, pointer).atexit = False
    return True


def _open(message: bytes, nbytes: int) -> mmap.mmap | None:
    """Return the memory that another rank offers; None if it cannot be opened from here."""
    try:
        offer = msgspec.msgpack.decode(message, type=_Offer)
        return open_memory(offer.path, offer.nonce, nbytes, "this host", writable=True)
    except (*UNREADABLE, OSError):
        return None


def _host() -> str:
    """Return what processes have in common that can open one another's memory; empty if that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{boot} {namespace} {os.getuid()}"
