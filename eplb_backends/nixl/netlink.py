"""Keeps the libnl that NIXL's wheel brings apart from the system's, so that a process that used NIXL can end.

UCX's module for EFA needs the system's `libefa.so.1`, and that the system's libibverbs and libnl, where rdma-core is
installed. NIXL's wheel brings a libnl of its own, under another file name. When the loader opens the module, it binds
the system's libnl to the wheel's symbols, so the system's constructors enter their objects into the wheel's lists; the
wheel's objects of the same names are there already, so they are refused; and the system's destructors then remove
objects that were never entered: SIGSEGV at the end of the process (seen with NIXL 1.5.1 and rdma-core 44).

A libnl that is loaded before, by itself and not for all (`RTLD_LOCAL`), is bound to itself. Nothing else changes: NIXL
uses its own libnl as before, and RDMA devices stay usable. `LD_PRELOAD` would not do: it binds the wheel's libnl to the
system's, and the process crashes likewise.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

SYSTEM_LIBRARY = "libnl-route-3.so.200"
"""What libibverbs needs. The system's libnl-3 comes with it."""

REMEDY = f'call ctypes.CDLL("{SYSTEM_LIBRARY}") before the first NIXL agent of the process is made'


def keep_apart() -> str:
    """Load the system's libnl, if there is one, before UCX does; return what is wrong if UCX was first, else ""."""
    entangled = entangled_libraries(loaded_libraries())
    if not entangled:
        try:
            ctypes.CDLL(SYSTEM_LIBRARY, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError:  # there is none, so there is nothing to keep apart
            return ""
        return ""
    own, system = entangled
    return f"{system} was loaded by UCX, and bound to {own}: the process may end with SIGSEGV"


def entangled_libraries(loaded: Sequence[str]) -> tuple[str, str] | None:
    """Return the wheel's libnl and the system's if the second was bound to the first, else None.

    Args:
        loaded: the libraries of a process, in the order in which they were loaded.
    """
    names = [Path(path).name for path in loaded]
    own = next((place for place, name in enumerate(names) if name.startswith("libnl-route-3-")), None)
    system = next((place for place, name in enumerate(names) if name.startswith("libnl-route-3.so")), None)
    efa = next((place for place, name in enumerate(names) if name.startswith("libefa.so")), None)
    if own is None or system is None or efa is None or not own < efa < system:
        return None
    return loaded[own], loaded[system]


class _Library(ctypes.Structure):
    """The beginning of `struct dl_phdr_info`."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def loaded_libraries() -> list[str]:
    """Return the paths of the libraries in this process, in the order in which they were loaded."""
    paths: list[str] = []

    def note(library: ctypes._Pointer[_Library], size: int, data: int | None) -> int:
        paths.append(os.fsdecode(library.contents.name or b""))
        return 0

    try:
        iterate = ctypes.CDLL(None).dl_iterate_phdr
    except (AttributeError, OSError):  # no glibc
        return []
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)
    iterate(callback(note), None)
    return paths
