"""Keeps the libnl of NIXL's wheel apart from the system's, so that a process that used NIXL exits cleanly.

UCX's module for EFA needs the system's `libefa.so.1`, which needs the system's libibverbs and libnl, if rdma-core is
installed. NIXL's wheel brings another libnl, under a different file name. When the loader opens the module, it binds
the system's libnl to the wheel's symbols, so the system's constructors enter their objects into the wheel's lists.
Objects of the same names are already there, so they are refused; and the system's destructors then remove objects that
were never entered: SIGSEGV at the end of the process (seen with NIXL 1.5.1 and rdma-core 44).

A libnl that is loaded earlier, separately and not globally (`RTLD_LOCAL`), is bound to itself. Nothing else changes:
NIXL uses its own libnl as before, and RDMA devices stay usable. `LD_PRELOAD` does not help: it binds the wheel's libnl
to the system's, and the process crashes as well.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

SYSTEM_LIBRARY = "libnl-route-3.so.200"
"""What libibverbs needs. The system's libnl-3 comes with it."""

_MAPS = Path("/proc/self/maps")

REMEDY = f'call ctypes.CDLL("{SYSTEM_LIBRARY}") before the first NIXL agent of the process is made'


def keep_apart() -> str:
    """Load the system's libnl, if there is one, before UCX does; return the problem if UCX was first, else ""."""
    entangled = entangled_libraries(loaded_libraries()) if _may_be_entangled() else None
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
    """The public part of the loader's `struct link_map`."""


_Library._fields_ = (
    ("address", ctypes.c_void_p),
    ("name", ctypes.c_char_p),
    ("dynamic", ctypes.c_void_p),
    ("next", ctypes.POINTER(_Library)),
    ("previous", ctypes.POINTER(_Library)),
)


def loaded_libraries() -> list[str]:
    """Return the paths of the libraries in this process, in the order in which they were loaded.

    It reads the loader's own list. `dl_iterate_phdr` would hold the loader's lock while it calls back into Python, and
    another thread that loads a library while holding the GIL would wait forever.
    """
    try:
        library = ctypes.cast(ctypes.CDLL(None)._handle, ctypes.POINTER(_Library))
    except OSError:
        return []
    paths = []
    while library:
        paths.append(os.fsdecode(library.contents.name or b""))
        library = library.contents.next
    return paths


def _may_be_entangled() -> bool:
    """Whether both are loaded in this process, which is rare: only then does their order matter."""
    try:
        mapped = _MAPS.read_bytes()
    except OSError:
        return False
    return b"/libnl-route-3-" in mapped and b"/libnl-route-3.so" in mapped
