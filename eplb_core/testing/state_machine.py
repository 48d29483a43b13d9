"""The communicator contract as a state machine: what any order of calls does, beside a plain model of it.

    from eplb_core.testing import run_state_machine

    run_state_machine("mine?window=16MiB", ranks=3)

Hypothesis draws programs of calls: queue, register, execute, refuse, leave a rank out, close, make anew. It makes a
program that fails as short as it can. The model is two lists for each pair of ranks, and whether all may go on.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from eplb_core.registry.registry import Registry
from eplb_core.testing.check import expect
from eplb_core.testing.machine_ranks import ProcessRanks, Ranks, Said, ThreadRanks

_SIZES = (0, 1, 7, 64, 4096, 70_001)
_generation = 0  # a store keeps what earlier programs have left


class CommunicatorMachine(RuleBasedStateMachine):
    """Calls on all ranks, and what must come of them."""

    ranks: Ranks
    sizes: tuple[int, ...] = _SIZES
    most_waits: int = 2

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()
        self._sent: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._expected: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._closed: set[int] = set()
        self._may_go_on = False
        self._epoch = 0
        self._waits = 0

    # --- calls -------------------------------------------------------------------------------------------------------

    @initialize()
    def make(self) -> None:
        """Make a communicator on all ranks."""
        global _generation
        _generation += 1
        for rank, said in enumerate(self._on_all("create", _generation)):
            expect(not said.kind, f"rank {rank} cannot make a communicator: {said.kind}: {said.error}")
        self._forget()
        self._closed.clear()
        self._may_go_on = True

    @precondition(lambda self: self._may_go_on)
    @rule(data=st.data())
    def queue(self, data: st.DataObject) -> None:
        """Queue messages on both of their ranks, in either order."""
        source, destination = self._pair(data)
        ends = [self._send, self._receive]
        for nbytes in data.draw(st.lists(st.sampled_from(self.sizes), min_size=1, max_size=4), "bytes"):
            for end in ends if data.draw(st.booleans(), "sender first") else reversed(ends):
                self._went_well(end(source, destination, nbytes))

    @precondition(lambda self: self._may_go_on)
    @rule(data=st.data(), sends=st.booleans())
    def queue_one_side(self, data: st.DataObject, sends: bool) -> None:
        """Queue on one rank only what has two."""
        source, destination = self._pair(data)
        nbytes = data.draw(st.sampled_from(self.sizes), "bytes")
        self._went_well((self._send if sends else self._receive)(source, destination, nbytes))

    @precondition(lambda self: self._may_go_on)
    @rule(data=st.data(), how=st.sampled_from(("itself", "nobody", "transposed")))
    def queue_what_is_refused(self, data: st.DataObject, how: str) -> None:
        """Queue what no communicator takes."""
        rank = self._rank(data)
        said = self._on(rank, "refuse", how)
        expect(said.kind == "InvalidTransferError", f"{how}: {said.kind or 'nothing'} was raised: {said.error}")

    @precondition(lambda self: self._may_go_on)
    @rule(data=st.data(), landing=st.booleans())
    def register(self, data: st.DataObject, landing: bool) -> None:
        """Register a tensor on one rank, as any of them may."""
        self._went_well(self._on(self._rank(data), "register", data.draw(st.sampled_from(self.sizes)), landing))

    @precondition(lambda self: self._may_go_on)
    @rule()
    def execute(self) -> None:
        """Move everything, or nothing if two sides do not match."""
        matches = all(self._sent[pair] == self._expected[pair] for pair in {*self._sent, *self._expected})
        for rank, said in enumerate(self._on_all("execute")):
            if matches:
                self._went_well(said, rank)
            else:
                expect(
                    said.kind == "TransferMismatchError",
                    f"two sides differ, and rank {rank} got {said.kind or 'no error'}: {said.error}",
                )
                expect(said.usable, f"rank {rank}: no byte moved, and it cannot be used again: {said.error}")
                expect(not said.wrong, f"rank {rank}: {said.wrong}")
        self._forget()

    @precondition(lambda self: self._may_go_on and self._waits < self.most_waits)
    @rule(data=st.data())
    def execute_without_one(self, data: st.DataObject) -> None:
        """Execute on all ranks but one."""
        self._waits += 1
        absent = self._rank(data)
        calls = [None if rank == absent else ("execute",) for rank in range(self.ranks.size)]
        for rank, said in enumerate(self.ranks.all(calls)):
            if rank != absent:
                self._failed(rank, said, f"rank {absent} was absent")
                if not said.usable:
                    again = self._on(rank, "execute")
                    expect(again.kind == "CommunicatorClosedError", f"rank {rank}: unusable, and then {again.kind!r}")
        self._may_go_on = False

    @precondition(lambda self: self._may_go_on and self._waits < self.most_waits)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        """Close on one rank, twice, and execute on all."""
        self._waits += 1
        closed = self._rank(data)
        self._went_well(self._on(closed, "close"))
        self._went_well(self._on(closed, "close"))
        for rank, said in enumerate(self._on_all("execute")):
            if rank == closed:
                expect(said.kind == "CommunicatorClosedError", f"it is closed, and {said.kind or 'nothing'} was raised")
            else:
                self._failed(rank, said, f"rank {closed} has closed")
        self._may_go_on = False

    @precondition(lambda self: self._may_go_on)
    @rule()
    def close_all_with_messages_queued(self) -> None:
        """Close on all ranks, whatever is queued."""
        for rank, said in enumerate(self._on_all("close")):
            self._went_well(said, rank)
        self._may_go_on = False

    @precondition(lambda self: not self._may_go_on)
    @rule()
    def make_anew(self) -> None:
        """Make another communicator, after a failure or not."""
        self.make()

    def teardown(self) -> None:
        """Close everything."""
        self._on_all("close")

    # --- words -------------------------------------------------------------------------------------------------------

    def _send(self, source: int, destination: int, nbytes: int) -> Said:
        queued = self._sent[source, destination]
        queued.append(nbytes)
        return self._on(source, "send", destination, len(queued) - 1, self._epoch, nbytes)

    def _receive(self, source: int, destination: int, nbytes: int) -> Said:
        queued = self._expected[source, destination]
        queued.append(nbytes)
        return self._on(destination, "receive", source, len(queued) - 1, self._epoch, nbytes)

    def _on(self, rank: int, *call: Any) -> Said:
        return self.ranks.all([call if other == rank else None for other in range(self.ranks.size)])[rank]

    def _on_all(self, *call: Any) -> list[Said]:
        return self.ranks.all([call] * self.ranks.size)

    def _forget(self) -> None:
        self._sent.clear()
        self._expected.clear()
        self._epoch += 1

    def _rank(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.ranks.size - 1), "rank")

    def _pair(self, data: st.DataObject) -> tuple[int, int]:
        source = self._rank(data)
        return source, (source + data.draw(st.integers(1, self.ranks.size - 1), "steps to")) % self.ranks.size

    def _went_well(self, said: Said, rank: int | None = None) -> None:
        where = "" if rank is None else f"rank {rank}: "
        expect(not said.kind, f"{where}{said.kind} was raised: {said.error}")
        expect(not said.wrong, f"{where}{said.wrong}")

    def _failed(self, rank: int, said: Said, why: str) -> None:
        expect(said.kind, f"{why}, and rank {rank} got no error")
        expect(said.own, f"{why}, and rank {rank} got a foreign error, {said.kind}: {said.error}")
        expect(not said.wrong, f"{why}, and on rank {rank} {said.wrong}")


def run_state_machine(
    config: str,
    *,
    ranks: int = 2,
    in_threads: bool = False,
    registry: Registry | None = None,
    timeout_s: float = 1.0,
    programs: int = 30,
    calls: int = 30,
    waits: int = 2,
    shorten: bool = True,
) -> None:
    """Run programs of calls that hypothesis draws, and raise if one does what the model does not.

    Args:
        config: the backend, as a config string without a timeout.
        ranks: how many, at least 2.
        in_threads: whether the ranks are threads of this process, as `in_process` needs them.
        registry: where to look the backend up, for ranks that are threads; the installed ones by default.
        timeout_s: of the communicators.
        programs: how many.
        calls: of one program, at most.
        waits: how often a program may leave a rank out, or close on one alone: the others wait for their timeout then.
        shorten: whether to look for the shortest program that fails, which runs many more.

    Raises:
        BrokenPromiseError: what was seen instead. Its notes are a program that shows it.
    """
    made: Ranks = (
        ThreadRanks(ranks, config, timeout_s, registry) if in_threads else ProcessRanks(ranks, config, timeout_s)
    )
    machine = type("Calls", (CommunicatorMachine,), {"ranks": made, "most_waits": waits})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=programs,
                stateful_step_count=calls,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                phases=[Phase.generate, Phase.shrink] if shorten else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        made.end()
