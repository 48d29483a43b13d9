"""Any order of calls does what a plain model says; transports that are wrong in one way are found out."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import importlib_metadata
import pytest

from eplb_core.contract.backend import ENTRY_POINT_GROUP, PLUGIN_API_VERSION, BackendSpec, Capabilities
from eplb_core.contract.payload import Payloads
from eplb_core.errors import CommunicatorClosedError
from eplb_core.registry.discovery import Registration
from eplb_core.registry.registry import Registry
from eplb_core.testing import in_process, run_state_machine
from eplb_core.testing.check import BrokenPromiseError
from eplb_core.testing.in_process import InProcessCommunicator
from tests.support.examples import TIMES


def test_threads_of_one_process_do_what_the_model_says() -> None:
    run_state_machine(
        "in_process", ranks=3, in_threads=True, registry=in_process.registry(), timeout_s=0.2, programs=25
    )


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("config", ["torch_gloo", "nixl?mode=packed&window=64KiB", "nixl?mode=direct"])
def test_real_transports_do_what_the_model_says(config: str, ranks: int) -> None:
    run_state_machine(config, ranks=ranks, programs=30 * TIMES, timeout_s=2.0)


# --- one thing wrong -------------------------------------------------------------------------------------------------


class Shuffles(InProcessCommunicator):
    """Gives a rank that receives several messages from another one the last one first."""

    def move(self, sends: Payloads, recvs: Payloads) -> None:
        super().move(sends, {peer: payloads[::-1] for peer, payloads in recvs.items()})


class Remembers(InProcessCommunicator):
    """Keeps what was queued when two sides did not match."""

    def execute(self) -> None:
        sends, recvs = self.queue.take()
        self.queue.add_payloads(sends, recvs)
        try:
            super().execute()
        except BaseException:
            with contextlib.suppress(CommunicatorClosedError):
                self.queue.add_payloads(sends, recvs)
            raise


class TakesItself(InProcessCommunicator):
    """Accepts messages to itself, and loses them."""

    def add_send(self, tensor: Any, dst_rank: int) -> None:
        if dst_rank != self.context.rank:
            super().add_send(tensor, dst_rank)


class ForgetsThatItIsClosed(InProcessCommunicator):
    """Executes after it was closed."""

    def close(self) -> None:
        return


class ClosesOnce(InProcessCommunicator):
    """Raises when it is closed again."""

    _was_closed = False

    def close(self) -> None:
        if self._was_closed:
            raise RuntimeError("closed already")
        self._was_closed = True
        super().close()


class SkipsEmpty(InProcessCommunicator):
    """Has one message fewer where one has no bytes."""

    def add_recv(self, tensor: Any, src_rank: int) -> None:
        if tensor.numel():
            super().add_recv(tensor, src_rank)


BROKEN = (Shuffles, Remembers, TakesItself, ForgetsThatItIsClosed, ClosesOnce, SkipsEmpty)


class OfTheseTests(Registry):
    def _registrations(self) -> dict[str, list[Registration]]:
        found = {}
        for kind in BROKEN:
            name, value = kind.__name__.lower(), f"{__name__}:SPEC_{kind.__name__}"
            point = importlib_metadata.EntryPoint(name, value, ENTRY_POINT_GROUP)
            found[name] = [Registration(name, value, "broken", "1", os.path.dirname(__file__), _entry_point=point)]
        return found


for _kind in BROKEN:
    globals()[f"SPEC_{_kind.__name__}"] = BackendSpec(
        name=_kind.__name__.lower(),
        summary="a broken transport",
        api_version=PLUGIN_API_VERSION,
        factory=f"{__name__}:{_kind.__name__}",
        capabilities=Capabilities(stateless_groups=True),
    )


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (Shuffles, "are wrong|was raised|got no error"),
        (Remembers, "TransferMismatchError was raised"),
        (TakesItself, "itself: nothing was raised"),
        (ForgetsThatItIsClosed, "it is closed, and|unusable, and then|has closed, and"),
        (ClosesOnce, "RuntimeError was raised: closed already"),
        (SkipsEmpty, "TransferMismatchError was raised|two sides differ, and rank . got no error"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_transport_is_found_with_a_program_that_shows_it(kind: type, seen: str) -> None:
    with pytest.raises(BrokenPromiseError, match=seen) as found:
        run_state_machine(
            kind.__name__.lower(),
            in_threads=True,
            registry=OfTheseTests(),
            timeout_s=0.5,
            programs=100,
            calls=12,
            waits=int(kind in (ForgetsThatItIsClosed, ClosesOnce)),
            shorten=False,
        )
    program = "\n".join(found.value.__notes__)
    assert "state.make()" in program
    assert "state.teardown()" in program
