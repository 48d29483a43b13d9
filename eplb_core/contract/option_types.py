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
        start_timeout: the longest that the ranks wait for one another to make the communicator, which they may come to
            minutes apart, after loading weights; None for the same as `timeout`.
    """

    timeout: Duration = field(
        default=Duration(60.0), metadata={"help": "the longest that any wait for a peer may take"}
    )
    start_timeout: Duration | None = field(
        default=None, metadata={"help": "the same for the ranks' meeting when a communicator is made; none = timeout"}
    )
