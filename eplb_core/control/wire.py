"""What reading another rank's message can raise: nothing that a peer sent is taken for what it claims to be."""

from __future__ import annotations

from typing import Final

import msgspec

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Raised by msgspec for bytes that are not a message, or not of the type that is expected."""
