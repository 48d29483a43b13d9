"""Tests whether CUDA IPC works on this machine: a second process reads what this one has written."""

from __future__ import annotations

import secrets
import subprocess
import sys

import torch

from eplb_core import ProbeResult
from eplb_core.errors import BackendUnavailableError
from eplb_cuda_ipc.calls import CudaError
from eplb_cuda_ipc.driver import CudaMemory
from eplb_cuda_ipc.memory import MemoryMapError

_BYTES = 4096
_READ_S = 20.0  # mostly for importing torch
_READER = "from eplb_cuda_ipc.probe import read; read({ordinal}, {handle!r}, {offset})"


def probe(device_type: str) -> ProbeResult:
    """Let a child process read 4096 bytes of this process's GPU memory; a `BackendProbe`."""
    if not torch.cuda.is_available():
        return ProbeResult(False, "torch sees no CUDA device")
    if torch.version.hip is not None:
        return ProbeResult(False, "this torch is built for ROCm")
    content = secrets.token_bytes(_BYTES)
    try:
        ordinal = torch.cuda.current_device()
        memory = CudaMemory(torch.device("cuda", ordinal))
        address = memory.allocate(_BYTES)
        memory.write(address, content)
        allocation = memory.exported(address)
    except (BackendUnavailableError, CudaError) as error:
        return ProbeResult(False, str(error))
    if allocation is None:
        return ProbeResult(False, "this GPU does not export its memory")
    code = _READER.format(ordinal=ordinal, handle=allocation.handle.hex(), offset=address - allocation.address)
    try:
        child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=_READ_S, check=False)
    except subprocess.TimeoutExpired:
        return ProbeResult(False, f"a second process did not map the memory within {_READ_S:g} s")
    finally:
        memory.free(address)
        memory.close()
    if child.returncode:
        last = (child.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
        return ProbeResult(False, f"a second process could not map the memory: {last}")
    if child.stdout.strip() != content.hex().encode():
        return ProbeResult(False, "a second process read wrong bytes")
    return ProbeResult(True, f"{_BYTES} bytes were read by a second process on {torch.cuda.get_device_name(ordinal)}")


def read(ordinal: int, handle: str, offset: int) -> None:
    """Print the bytes of mapped memory, in hexadecimal; run by the child of `probe`."""
    memory = CudaMemory(torch.device("cuda", ordinal))
    try:
        begin = memory.map(bytes.fromhex(handle))
        print(memory.read(begin + offset, _BYTES).hex())
        memory.unmap(begin)
    except MemoryMapError as error:
        sys.exit(str(error))
