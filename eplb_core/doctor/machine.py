"""Facts about the machine for `eplb doctor`: versions, devices, and limits that affect transports."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eplb_core import __version__
from eplb_core.doctor.checks import Finding, Severity
from eplb_core.extras import require
from eplb_core.launch.memory import free_memory, memory_limit

_SHARED_MEMORY = Path("/dev/shm")
_PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_RDMA_DEVICES = Path("/sys/class/infiniband")
_LEAST_SHARED_BYTES = 1 << 30  # containers get 64 MiB by default
_LEAST_OPEN_FILES = 4096  # every peer takes a few
_PTRACE_BY_CAPABILITY = 2  # from here on a process may only read another's memory with CAP_SYS_PTRACE
_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "PYTORCH_", "TORCH_", "UCX_", "NCCL_", "GLOO_", "EPLB_")
_NAMES = ("GLIBC_TUNABLES", "LD_LIBRARY_PATH", "LD_PRELOAD", "NO_PROXY", "OMP_NUM_THREADS")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True, slots=True)
class Machine:
    """One host, as one process sees it.

    Attributes:
        host: its name.
        facts: name -> value, in reading order.
        environment: the variables relevant to transports that are set.
        findings: problems and warnings.
    """

    host: str
    facts: dict[str, str]
    environment: dict[str, str]
    findings: list[Finding] = field(default_factory=list)


def look_at_machine(modules: Iterable[str]) -> Machine:
    """Inspect this machine.

    Args:
        modules: top-level modules that the installed backends need; the versions of their distributions are facts,
            and variables that begin with their names belong to the environment.

    Raises:
        InputError: psutil is not installed.
    """
    require("cli", "inspecting this machine")
    import psutil

    names = sorted(set(modules))
    findings: list[Finding] = []
    facts = {"eplb": __version__, "Python": platform.python_version(), "torch": str(torch.__version__)}
    facts |= _versions_of(names)
    facts |= _devices()
    facts["kernel"] = platform.release()
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    limit = memory_limit()
    within = f", at most {_gib(limit)} in this container" if limit is not None and limit < memory.total else ""
    facts["CPU"] = f"{cores} cores, {_gib(free_memory())} of {_gib(memory.total)} free{within}"
    facts["/dev/shm"] = _shared_memory(findings)
    facts["locked memory"] = _locked_memory(findings)
    facts["open files"] = _open_files(findings)
    facts["reading other processes"] = _cross_memory(findings)
    facts["RDMA devices"] = ", ".join(rdma_devices()) or "none"
    environment = variables_that_matter(os.environ, names)
    findings += _allocator(environment)
    return Machine(platform.node(), facts, environment, findings)


def variables_that_matter(environment: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Return the variables that torch, a transport, or a backend's module may read, sorted."""
    prefixes = (*_PREFIXES, *(f"{module.upper()}_" for module in modules if module != "torch"))
    return {name: value for name, value in sorted(environment.items()) if name.startswith(prefixes) or name in _NAMES}


def rdma_devices() -> list[str]:
    """Return the names of the RDMA network devices."""
    try:
        return sorted(entry.name for entry in _RDMA_DEVICES.iterdir())
    except OSError:
        return []


def _versions_of(modules: Iterable[str]) -> dict[str, str]:
    by_module = importlib.metadata.packages_distributions()
    named = {name for module in modules for name in by_module.get(module, ())}
    return {name: importlib.metadata.version(name) for name in sorted(named - {"torch"})}


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {"GPU": "torch sees none" + (f" (it is built for {built})" if built else " (it is built without)")}
    hip = torch.version.hip
    count = torch.cuda.device_count()
    facts = {"ROCm" if hip else "CUDA": f"{hip or torch.version.cuda}, driver {_driver()}"}
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{properties.name}, {_gib(properties.total_memory)}"
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        reached = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        facts["GPU to GPU"] = f"{reached} of {len(pairs)} pairs have direct access"
    return facts


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _shared_memory(findings: list[Finding]) -> str:
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
    except OSError as error:
        remedy = "mount a tmpfs there"
        findings.append(Finding("/dev/shm", Severity.WARNING, f"it does not exist: {error.strerror}", remedy))
        return "missing"
    if usage.free < _LEAST_SHARED_BYTES:
        remedy = "give the container --shm-size=8g, or --ipc=host"
        findings.append(Finding("/dev/shm", Severity.WARNING, f"only {_gib(usage.free)} are free", remedy))
    return f"{_gib(usage.free)} of {_gib(usage.total)} free"


def _locked_memory(findings: list[Finding]) -> str:
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    if soft != "unlimited" and rdma_devices():
        remedy = "ulimit -l unlimited, or --ulimit memlock=-1 for a container"
        detail = f"it is limited to {soft}, but memory registered for RDMA must be locked"
        findings.append(Finding("locked memory", Severity.WARNING, detail, remedy))
    return f"ulimit -l {soft} (at most {hard})"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value >> 10} KiB"


def _open_files(findings: list[Finding]) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_OPEN_FILES:
        detail = f"a process may open {soft} files, and each peer takes a few"
        findings.append(Finding("open files", Severity.WARNING, detail, f"ulimit -n {max(hard, _LEAST_OPEN_FILES)}"))
    return f"ulimit -n {soft}"


def _cross_memory(findings: list[Finding]) -> str:
    """Check whether ranks of this host can copy from one another's memory (CMA), the alternative to tcp."""
    if not _can_read_memory():
        detail = "process_vm_readv is refused, so ranks of one host cannot copy from one another's memory"
        remedy = "--cap-add=SYS_PTRACE for the container, or a seccomp profile that allows process_vm_readv"
        findings.append(Finding("reading other processes", Severity.WARNING, detail, remedy))
        return "refused"
    try:
        scope = int(_PTRACE_SCOPE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return "allowed, no ptrace_scope"
    if scope >= _PTRACE_BY_CAPABILITY:
        detail = f"ptrace_scope is {scope}: ranks of one host cannot copy from one another's memory"
        remedy = f"echo 1 > {_PTRACE_SCOPE}, or give the processes CAP_SYS_PTRACE"
        findings.append(Finding("reading other processes", Severity.WARNING, detail, remedy))
    return f"allowed, ptrace_scope {scope}"


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _can_read_memory() -> bool:
    """Return whether process_vm_readv works on this process itself: a seccomp filter refuses even that."""
    source, target = ctypes.create_string_buffer(b"x", 1), ctypes.create_string_buffer(1)
    there, here = _Vector(ctypes.addressof(source), 1), _Vector(ctypes.addressof(target), 1)
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:
        return False
    call.restype = ctypes.c_ssize_t
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    return bool(call(os.getpid(), ctypes.byref(here), one, ctypes.byref(there), one, none) == 1)


def _allocator(environment: Mapping[str, str]) -> list[Finding]:
    """Return a warning if device memory comes in expandable segments: one-sided READs of it are slow or wrong."""
    for name in _ALLOCATOR_VARIABLES:
        settings = dict(part.partition(":")[::2] for part in environment.get(name, "").replace(" ", "").split(","))
        if settings.get("expandable_segments", "").lower() == "true":
            detail = f"{name} turns expandable_segments on: one-sided transports cannot read such memory reliably"
            return [Finding("device allocator", Severity.WARNING, detail, f"remove expandable_segments from {name}")]
    return []


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
