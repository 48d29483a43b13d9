"""Known backends, and how to install them. The only place in the core that names a backend."""

from __future__ import annotations

from typing import Final

KNOWN_BACKENDS: Final = {
    "nixl": 'pip install "eplb[nixl]"',
    "pynccl": 'pip install "eplb[nccl]"',
    "shm": "pip install eplb-shm",
    "cuda_ipc": "pip install eplb-cuda-ipc",
    "mooncake": 'pip install "eplb-mooncake[cpu]"',
}
"""Name -> the command that installs it."""

DEFAULT_BACKEND: Final = "torch_nccl"
"""The backend used if none is named, as in the original interface. It moves CPU tensors over the CPU group."""
