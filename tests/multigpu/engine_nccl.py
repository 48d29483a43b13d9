"""An engine's own NCCL communicator, as a group coordinator carries it: libnccl, called without any code of ours."""

from __future__ import annotations

import ctypes
import datetime
from typing import Any

import torch
import torch.distributed as dist

_LIBRARY = "libnccl.so.2"  # torch has loaded it; its name is enough
_UINT8 = 1
_ID_BYTES = 128


def why_not() -> str:
    """Return why there can be no such communicator here, or an empty text."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return f"an engine's NCCL communicator takes {_LIBRARY}: {error}"
    return ""


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * _ID_BYTES)]


class EngineNccl:
    """Has the attributes and methods of what engines call `pynccl_comm`; their `send` and `recv` move raw bytes.

    Args:
        store: where rank 0 leaves the id; every incarnation takes a prefix of its own.
        rank: this rank.
        size: the number of ranks.
        device: this rank's GPU.
    """

    disabled = False
    available = True

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.world_size = rank, size
        self._nccl: Any = ctypes.CDLL(_LIBRARY)
        self._nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
        message = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._nccl.ncclSend.argtypes = self._nccl.ncclRecv.argtypes = message
        self._nccl.ncclCommAbort.argtypes = [ctypes.c_void_p]
        identity = _UniqueId()
        if rank == 0:
            self._check(self._nccl.ncclGetUniqueId(ctypes.byref(identity)))
            store.set("id", ctypes.string_at(ctypes.byref(identity), _ID_BYTES).hex())
        store.wait(["id"], datetime.timedelta(seconds=60))
        ctypes.memmove(ctypes.byref(identity), bytes.fromhex(store.get("id").decode()), _ID_BYTES)
        self._communicator = ctypes.c_void_p()
        with torch.cuda.device(device):
            self._check(self._nccl.ncclCommInitRank(ctypes.byref(self._communicator), size, identity, rank))

    def send(self, tensor: torch.Tensor, dst: int, stream: torch.cuda.Stream | None = None) -> None:
        self._check(self._nccl.ncclSend(*self._message(tensor, dst, stream)))

    def recv(self, tensor: torch.Tensor, src: int, stream: torch.cuda.Stream | None = None) -> None:
        self._check(self._nccl.ncclRecv(*self._message(tensor, src, stream)))

    def group_start(self) -> None:
        self._check(self._nccl.ncclGroupStart())

    def group_end(self) -> None:
        self._check(self._nccl.ncclGroupEnd())

    def abort(self) -> None:
        """End what is under way, as the engine does when it learns of a dead rank."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        if communicator:
            self._check(self._nccl.ncclCommAbort(communicator))

    def _message(self, tensor: torch.Tensor, peer: int, stream: torch.cuda.Stream | None) -> tuple[Any, ...]:
        stream = stream or torch.cuda.current_stream(tensor.device)
        return tensor.data_ptr(), tensor.nbytes, _UINT8, peer, self._communicator, stream.cuda_stream

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            raise RuntimeError(f"NCCL returned {result}")
