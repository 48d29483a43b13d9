"""The types of backend options."""

from __future__ import annotations

from dataclasses import dataclass, field


class ByteSize(int):
    """An option's type: a number of bytes, written with a unit (`256MiB`, `1GB`, `512B`)."""


class Duration(float):
    """An option's type: seconds, written with a unit (`30s`, `500ms`, `5min`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The options common to all backends. A backend's options class may derive from it, frozen and keyword-only.

    Attributes:
        timeout: the longest that any wait for a peer may take.
        start_timeout: the longest that ranks wait for one another when the communicator is made: after loading
            weights they may arrive minutes apart. None means the same as `timeout`.
    """

    timeout: Duration = field(
        default=Duration(60.0), metadata={"help": "the longest that any wait for a peer may take"}
    )
    start_timeout: Duration | None = field(
        default=None, metadata={"help": "the longest wait for all ranks when a communicator is made; none = timeout"}
    )
