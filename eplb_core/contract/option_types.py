"""The types that a backend writes its options with."""

from __future__ import annotations

from dataclasses import dataclass, field


class ByteSize(int):
    """An option's type: a number of bytes, written with a unit (`256MiB`, `1GB`, `512B`)."""


class Duration(float):
    """An option's type: seconds, written with a unit (`30s`, `500ms`, `5min`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The options of every backend. A backend's own options class may derive from it, frozen and keyword-only.

    Attributes:
        timeout: the longest that any wait for a peer may take.
    """

    timeout: Duration = field(
        default=Duration(60.0), metadata={"help": "the longest that any wait for a peer may take"}
    )
