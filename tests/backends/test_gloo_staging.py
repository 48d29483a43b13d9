"""Device tensors over gloo go through bounded host buffers; here CPU tensors do, so that it runs anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_backends.torch_gloo.communicator import GlooCommunicator
from eplb_backends.torch_gloo.options import GlooOptions
from eplb_backends.torch_gloo.staging import cut
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import ByteSize
from eplb_core.contract.payload import Payload
from eplb_core.control.groups import TorchGroups, open_control_plane
from tests.support.ranks import POISON, Member, Report, Scenario, run_scenarios

RANKS = 3
WINDOW = 64 << 10
SIZES = {0: (0, 1, 40_000), 1: (WINDOW, 5 * WINDOW + 7, 3), 2: (100_000,)}  # bytes of each tensor, by source rank


def test_parts_are_full_but_for_the_last_and_keep_the_order() -> None:
    tensors = [torch.arange(size, dtype=torch.uint8) for size in (5, 0, 8, 3)]
    rounds = cut({1: [*map(Payload, tensors)], 2: [Payload(tensors[0])]}, 6)
    sent_to_1 = [torch.cat(parts[1]).tolist() for parts in rounds]
    assert sent_to_1 == [[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 6], [7, 0, 1, 2]]
    assert [torch.cat(parts[2]).tolist() for parts in rounds if 2 in parts] == [[0, 1, 2, 3, 4]]


def content(source: int, to: int, index: int, nbytes: int) -> torch.Tensor:
    random = np.random.default_rng([source, to, index])
    return torch.from_numpy(random.integers(0, 256, nbytes, dtype=np.uint8))


def far_more_than_the_window(member: Member) -> tuple[bool, int, int]:
    """Every rank sends all of its tensors to every other one; return whether all bytes came, and the staging."""
    control = open_control_plane(TorchGroups(), 30.0)
    context = BackendContext(rank=member.rank, world_size=RANKS, device=torch.device("cpu"), control=control)
    group = dist.group.WORLD
    assert group is not None
    communicator = GlooCommunicator(context, GlooOptions(window=ByteSize(WINDOW)), group, staged=True)
    peers = [rank for rank in range(RANKS) if rank != member.rank]
    landed: list[tuple[int, int, torch.Tensor]] = []
    right = True
    for _ in range(2):
        for peer in peers:
            for index, nbytes in enumerate(SIZES[member.rank]):
                communicator.add_send(content(member.rank, peer, index, nbytes), peer)
            for index, nbytes in enumerate(SIZES[peer]):
                tensor = torch.full((nbytes,), POISON, dtype=torch.uint8)
                communicator.add_recv(tensor, peer)
                landed.append((peer, index, tensor))
        communicator.execute()
        right &= all(torch.equal(t, content(peer, member.rank, index, len(t))) for peer, index, t in landed)
    stats = communicator.last_stats
    assert stats is not None
    limit = communicator.transfer_limit_bytes
    staging = communicator.staging_bytes
    communicator.close()
    return right, staging, -1 if limit is None else limit


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(RANKS, [Scenario("more", far_more_than_the_window)])


def test_any_number_of_bytes_goes_through_a_bounded_window(report: Report) -> None:
    for right, staging, limit in report.returned("more"):
        assert right
        assert 0 < staging <= WINDOW
        assert limit == -1
