"""Calls functions of NVIDIA's bindings: returns results without codes, and raises errors that name the call."""

from __future__ import annotations

from typing import Any

from eplb_core.errors import BackendUnavailableError


class CudaError(RuntimeError):
    """The driver refused a call. The text names the call and the driver's error code."""


def load_driver() -> Any:
    """Return NVIDIA's binding of the driver.

    Raises:
        BackendUnavailableError: it is not installed, or cannot be loaded.
    """
    try:
        from cuda.bindings import driver
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailableError(
            "the binding of the CUDA driver cannot be loaded",
            name="cuda_ipc",
            why=f"{type(error).__name__}: {error}",
            remedy="pip install cuda-bindings, of the CUDA version that torch was built for",
        ) from error
    return driver


def call(driver: Any, function: str, *arguments: Any) -> Any:
    """Call one function of a binding, and return its result, or results, without the error code.

    Raises:
        CudaError: the code reports a failure, or there is no driver.
    """
    try:
        code, *results = getattr(driver, function)(*arguments)
    except RuntimeError as error:  # raised by the binding if there is no libcuda
        raise CudaError(f"{function}: {error}") from error
    if int(code):
        raise CudaError(f"{function}: {getattr(code, 'name', code)}")
    return results[0] if len(results) == 1 else results
