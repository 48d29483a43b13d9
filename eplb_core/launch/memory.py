"""How much memory is free for child processes, on the host or in this container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes of free memory: on the host, or below the lowest cgroup limit if that is less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_free_in_groups(_OWN_GROUPS, _GROUPS)])


def memory_limit() -> int | None:
    """Return the lowest cgroup memory limit of this process, in bytes; None if there is none."""
    return min((limit for limit, _ in _limits(_OWN_GROUPS, _GROUPS)), default=None)


def _free_in_groups(own: Path, groups: Path) -> Iterator[int]:
    for limit, used in _limits(own, groups):
        yield max(0, limit - used)


def _limits(own: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each cgroup around this process that has a limit.

    Cached files that the kernel may drop count as free.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, use = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, use = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, while the mounted group is the container's.
        inside = top / path.lstrip("/")
        for folder in dict.fromkeys((inside, *(each for each in inside.parents if each.is_relative_to(top)), top)):
            most, used = _number(folder / limit), _number(folder / use)
            if most is not None and used is not None:
                yield most, max(0, used - _inactive_files(folder))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" stands for no limit


def _inactive_files(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    number = found.get("total_inactive_file", found.get("inactive_file", "0"))
    return int(number) if number.isdigit() else 0
