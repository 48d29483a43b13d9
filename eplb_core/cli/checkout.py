"""Install commands for an eplb that runs from a checkout, where its packages are directories next to it."""

from __future__ import annotations

import re
from pathlib import Path

import eplb_core

_COMMAND = re.compile(r'pip install "?(?P<name>eplb(?:-[a-z]+)*)(?P<extras>\[[a-z,]+\])?"?(?![\w-])')


def checkout() -> Path | None:
    """Return the root of the checkout that eplb is imported from, or None if it was installed from a wheel."""
    root = Path(eplb_core.__file__).resolve().parents[1]
    return root if (root / "plugins").is_dir() and (root / "pyproject.toml").is_file() else None


def with_local_commands(text: str, root: Path | None = None) -> str:
    """Return `text` with `pip install eplb-...` replaced by the command for the checkout, if eplb runs from one.

    Args:
        text: an error or a table's cell.
        root: the checkout; by default the one that eplb runs from.
    """
    root = root or checkout()
    if root is None:
        return text
    where = root

    def local(command: re.Match[str]) -> str:
        name, extras = command["name"], command["extras"] or ""
        folder = where if name == "eplb" else where / "plugins" / name
        return f"pip install -e '{folder}{extras}'" if folder.is_dir() else command[0]

    return _COMMAND.sub(local, text)
