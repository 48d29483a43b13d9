"""What is fed with bytes that somebody else made, and what may come of it: an answer, or an error of eplb."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eplb_core.control.board import Board, OwnPage
from eplb_core.errors import EplbError

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        read: is given the name of an input, which says what kind of file it is, and its bytes.
        own: what it may raise.
    """

    read: Callable[[str, bytes], object]
    own: tuple[type[BaseException], ...] = (EplbError,)


def _config(_name: str, content: bytes) -> None:
    from eplb_core.registry.config import parse_config
    from eplb_core.registry.registry import default_registry

    # What a command line can be given: bytes that are not of UTF-8 come as lone surrogates.
    text = content.decode("utf-8", "surrogateescape")
    resolved = default_registry().resolve(parse_config(text))
    assert str(parse_config(resolved.options.canonical())) is not None


def _file(name: str, content: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"input.{name.rpartition('.')[2]}")
        path.write_bytes(content)
        read(path)


def _loads(name: str, content: bytes) -> None:
    from eplb_core.inputs.loads import read_load_window, read_loads

    _file(name, content, read_loads)
    _file(name, content, read_load_window)


def _placement(name: str, content: bytes) -> None:
    from eplb_core.inputs.placement_formats import read_placement_file

    _file(name, content, read_placement_file)
    _file(name, content, lambda path: read_placement_file(path, 3))


def _plan(_name: str, content: bytes) -> None:
    from eplb_core.planning.plan_json import decode_plan

    decode_plan(content)


def _checkpoint(name: str, content: bytes) -> None:
    """Put a file in the place of one of a good checkpoint's, as its name says."""
    from eplb_core.inputs.checkpoint import Checkpoint
    from eplb_core.inputs.make_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        make_checkpoint(directory, style="qwen3", layers=1, experts=2, hidden=8, intermediate=8, shards=1)
        part = {"config": "config.json", "index": "model.safetensors.index.json"}.get(name.partition("-")[0])
        shard = next(iter(directory.glob("*.safetensors")))
        (shard if part is None else directory / part).write_bytes(content)
        opened = Checkpoint.open(directory)
        for layer in range(opened.num_layers):
            for expert in range(min(opened.num_experts, 4)):
                opened.expert_tensors(layer, expert)


class _Said:
    """A control plane on which the other rank says something strange."""

    rank, world_size = 0, 2

    def __init__(self, said: bytes) -> None:
        self._said = said

    def all_gather(self, _what: str, payload: bytes, _timeout_s: float) -> list[bytes]:
        return [payload, self._said]

    def settle(self, _name: str, _value: bytes) -> bytes:
        return self._said

    def settled(self, _name: str) -> bytes | None:
        return self._said

    def ask_store(self) -> None:
        return

    def add(self, _name: str, _amount: int) -> int:
        return 1


def _message(_name: str, content: bytes) -> None:
    """Have every place that reads what another rank said read the same bytes; each of them may refuse."""
    from eplb_core.control.agreement import all_say
    from eplb_core.control.commit_record import CommitRecord
    from eplb_core.factory.proposal import Proposal, agree
    from eplb_core.inputs.checkpoint_wire import decode_checkpoint
    from eplb_core.rearrange.shared_schedule import share_cuts
    from eplb_core.transport.match import check_match

    control: Any = _Said(content)
    proposal = Proposal(**dict.fromkeys(Proposal.__struct_fields__, ""))
    readers: Iterable[Callable[[], object]] = (
        lambda: all_say(control, "something", 1.0),
        lambda: agree(control, proposal, None, 1.0),
        lambda: share_cuts(control, lambda group: [], 2, 1.0),
        lambda: CommitRecord(control, 1.0).decide("step 0"),
        lambda: check_match(control, {}, {}, 1.0),
        lambda: decode_checkpoint(content),
        lambda: _read_board(content),
    )
    for read in readers:
        try:
            read()
        except EplbError as error:
            str(error).encode()


def _read_board(content: bytes) -> None:
    own, other = OwnPage(), OwnPage()
    try:
        board = Board(own, [own.offer, other.offer], 0)
        size = len(other.memory)
        other.memory[: min(len(content), size)] = content[:size]
        for number in range(3):
            board.read(1, number)
    finally:
        own.close_file()
        other.close_file()


TARGETS = {
    "config": Target(_config),
    "loads": Target(_loads),
    "placement": Target(_placement),
    "plan": Target(_plan),
    "checkpoint": Target(_checkpoint),
    "message": Target(_message),
}
"""Kind of input, which is a folder of the corpus -> what reads it."""
