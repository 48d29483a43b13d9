"""Maps errors of other libraries to transfer errors."""

from __future__ import annotations

import torch

from eplb_core.errors import ControlPlaneError, TransferError, TransferTimeoutError

_NO_MEMORY = ("out of memory", "can't allocate memory")  # torch's allocator for CPUs raises a plain RuntimeError


def as_transfer_error(error: BaseException, phase: str = "move") -> TransferError:
    """Return the error that `execute()` raises for an exception in the middle of a transfer.

    A `TransferError` is returned unchanged. After any other exception this rank does not know what its peers have seen
    of the transfer, so the communicator cannot be used again.

    Args:
        error: the caught exception.
        phase: the step of the transfer, in one word.
    """
    if isinstance(error, TransferError):
        return error
    if isinstance(error, ControlPlaneError):
        return TransferTimeoutError(error.what, peers=error.missing, phase=phase, why=error.why, remedy=error.remedy)
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, TimeoutError):
        return TransferTimeoutError("the transfer did not end in time on this rank", phase=phase, why=why)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return TransferError(
            "this rank ran out of memory in the middle of a transfer",
            phase=phase,
            why=why,
            remedy="free memory there, or configure less staging memory; then make a new communicator",
        )
    return TransferError("the transfer failed on this rank", phase=phase, why=why)
