"""The messages between two ranks over their socket. Everything is typed and length-checked; nothing is unpickled."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct("<I")
_LONGEST: Final = 64 << 20  # an `Offer` takes 12 bytes for each tensor


class Region(msgspec.Struct, array_like=True, frozen=True):
    """An allocation that the receiver of this may map.

    Attributes:
        nbytes: its size.
        handle: by which it is mapped.
    """

    nbytes: int
    handle: bytes


class Tensor(msgspec.Struct, array_like=True, frozen=True):
    """A tensor that the sender has registered.

    Attributes:
        region: the number of the region that contains it, or -1 if its memory cannot be mapped.
        offset: its start in the region, in bytes.
        dtype: such as `bfloat16`.
        shape: its sizes.
        stride: bytes from one row, of the first dimension, to the next.
    """

    region: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: int


class Show(msgspec.Struct, tag="show", array_like=True, frozen=True):
    """Memory to map, and tensors in it. Both continue those shown before; regions are numbered from 0."""

    regions: list[Region]
    tensors: list[Tensor]


class Offer(msgspec.Struct, tag="offer", array_like=True, frozen=True):
    """The sender's tensors of a round. All of them can be read now.

    Attributes:
        epoch: the round's number.
        count: how many tensors.
        digest: of their sizes and dtypes.
        regions: little-endian int32 of each: the region that contains it, or -1 if it comes in chunks.
        offsets: little-endian int64 of each: its start in the region, in bytes.
    """

    epoch: int
    count: int
    digest: bytes
    regions: bytes
    offsets: bytes


class Chunk(msgspec.Struct, tag="chunk", array_like=True, frozen=True):
    """The next packed chunk is in a slot of the sender's window."""

    epoch: int
    slot: int


class Taken(msgspec.Struct, tag="taken", array_like=True, frozen=True):
    """A chunk was copied out of this slot of the receiver's window; the slot is free again."""

    epoch: int
    slot: int


class Done(msgspec.Struct, tag="done", array_like=True, frozen=True):
    """All of the receiver's tensors of this round were copied; the sender no longer reads them."""

    epoch: int


class GaveUp(msgspec.Struct, tag="gave up", array_like=True, frozen=True):
    """The sender's transfer has failed.

    Attributes:
        rank: the rank to blame.
        error: the name of the error's class.
        text: what happened.
    """

    rank: int
    error: str
    text: str


class Bye(msgspec.Struct, tag="bye", array_like=True, frozen=True):
    """The sender has closed its communicator, and no longer maps memory of the receiver."""


OfRound = Offer | Chunk | Taken | Done
"""The messages that carry the number of their round."""

Message = Show | OfRound | GaveUp | Bye

_decoder: Final = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as it is sent, its length first."""
    content = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(content)) + content


def decode(stream: bytearray) -> list[Message]:
    """Remove all complete messages from the front of `stream`, and return them.

    Raises:
        ValueError: it is not a valid message.
    """
    messages, begin = [], 0
    try:
        while len(stream) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(stream, begin)
            if length > _LONGEST:
                raise ValueError(f"a message of {length} bytes")
            end = begin + _LENGTH.size + length
            if len(stream) < end:
                break
            messages.append(_decoder.decode(bytes(stream[begin + _LENGTH.size : end])))
            begin = end
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    del stream[:begin]
    return messages
