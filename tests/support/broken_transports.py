"""Transports that are wrong in one way each, and the check that has to find it. All move bytes over gloo."""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from eplb_core import BackendContext, CommonOptions, EplbCommunicator, PendingTransfer, ProbeResult, TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError, TransferMismatchError, TransferTimeoutError
from eplb_core.transport import (
    Message,
    Payload,
    Payloads,
    TransferQueue,
    as_bytes,
    as_transfer_error,
    check_match,
    exchange,
)

KIB, MIB = 1 << 10, 1 << 20


class Transfer(NamedTuple):
    """A tensor, and the rank that it goes to or comes from."""

    tensor: torch.Tensor
    peer: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def by_peer(transfers: Sequence[Transfer]) -> Payloads:
    peers = sorted({transfer.peer for transfer in transfers})
    return {peer: [Payload(each.tensor) for each in transfers if each.peer == peer] for peer in peers}


class Sound(EplbCommunicator):
    """A transport with nothing wrong; the others change one thing."""

    def __init__(self, context: BackendContext, options: CommonOptions, weights: Sequence[torch.Tensor]) -> None:
        if context.cpu_group is None:
            raise BackendUnavailableError("it needs a process group", name="sound")
        self.control = context.control
        self.rank = context.rank
        self.group = context.cpu_group
        self.timeout_s = float(options.timeout)
        self.queue = TransferQueue(context.rank, context.world_size, context.device)
        self.stats: TransferStats | None = None

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        self.queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        self.queue.add_recv(tensor, src_rank)

    def execute(self) -> None:
        sends, recvs = self.take()
        try:
            self.check(sends, recvs)
            self.move(sends, recvs)
        except Exception as error:
            failure = as_transfer_error(error)
            if not failure.usable:
                self.queue.close(failure.what)
            raise failure from error
        self.stats = TransferStats(
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
        )

    def take(self) -> tuple[list[Transfer], list[Transfer]]:
        sends, recvs = (
            [Transfer(payload.tensor, peer) for peer, payloads in side.items() for payload in payloads]
            for side in self.queue.take()
        )
        return sends, recvs

    def check(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        check_match(self.control, by_peer(sends), by_peer(recvs), self.timeout_s)

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        post = [[Message(as_bytes(t.tensor), t.peer) for t in side if t.nbytes] for side in (sends, recvs)]
        exchange(self.group, post[0], post[1], self.timeout_s)

    def close(self) -> None:
        self.queue.close("it was closed")

    @property
    def last_stats(self) -> TransferStats | None:
        return self.stats


# --- what arrives ----------------------------------------------------------------------------------------------------


class DropsTheLastByte(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        kept = [as_bytes(recv.tensor)[-1:].clone() for recv in recvs]
        super().move(sends, recvs)
        for recv, last in zip(recvs, kept, strict=True):
            if recv.nbytes % 2 and recv.nbytes < 16 * MIB:
                as_bytes(recv.tensor)[-1:] = last


class SwapsTwoMessages(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, recvs)
        same = [as_bytes(recv.tensor) for recv in recvs if recv.nbytes == 320 and recv.peer == recvs[0].peer]
        if len(same) == 8:
            same[6][:], same[7][:] = same[7].clone(), same[6].clone()


class LosesManyMessages(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        kept = [recv.tensor.clone() for recv in recvs[256:]]
        super().move(sends, recvs)
        for recv, before in zip(recvs[256:], kept, strict=True):
            recv.tensor.copy_(before)


class ChangesSomeNumbers(Sound):
    """It converts, as a transport does that computes instead of copying."""

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, recvs)
        for recv in recvs:
            if recv.tensor.dtype == torch.float16:
                recv.tensor.nan_to_num_()


class WritesBeyondTheEnd(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, recvs)
        for recv in recvs:
            begin = recv.tensor.storage_offset() * recv.tensor.element_size()
            whole = torch.empty(0, dtype=torch.uint8).set_(recv.tensor.untyped_storage())
            if begin:
                whole[begin + recv.nbytes :][: -recv.nbytes % 64] = 0


class ChangesTheSentTensor(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, recvs)
        for send in sends:
            if send.nbytes == 200_000:
                as_bytes(send.tensor)[0] ^= 1


class ReturnsTooEarly(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        late = [recv for recv in recvs if 6 * MIB < recv.nbytes < 16 * MIB]
        hidden = {id(recv): Transfer(torch.empty_like(recv.tensor), recv.peer) for recv in late}
        super().move(sends, [hidden.get(id(recv), recv) for recv in recvs])
        for recv in late:
            threading.Timer(0.05, recv.tensor.copy_, (hidden[id(recv)].tensor,)).start()


class ReadsTheSentTensorLate(Sound):
    """Who only sends goes on at once, and what it sends is read some time later."""

    reading: threading.Thread | None = None

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        if self.reading is not None:
            self.reading.join()
        if sends and not recvs and all(send.nbytes == 2 * MIB for send in sends):
            self.reading = threading.Thread(target=self._later, args=(sends,))
            self.reading.start()
        else:
            super().move(sends, recvs)

    def _later(self, sends: list[Transfer]) -> None:
        time.sleep(0.1)
        super().move(sends, [])


class ReadsWhenAdded(Sound):
    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        super().add_send(tensor, dst_rank)
        self.queue.sends[dst_rank][-1] = Payload(tensor.clone())


class PutsPayloadsFirst(Sound):
    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        added = self.queue.sends
        self.queue.sends = {}
        super().add_payloads(sends, recvs)
        for peer, payloads in added.items():
            self.queue.sends.setdefault(peer, []).extend(payloads)


class GoesStale(Sound):
    """It keeps what a registered tensor held the fiftieth time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: dict[int, int] = {}
        self.kept: dict[int, torch.Tensor] = {}

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        self.times = {tensor.data_ptr(): 0 for tensor in tensors if not landing} or self.times

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        for at, send in enumerate(sends):
            address = send.tensor.data_ptr()
            if address in self.times:
                self.times[address] += 1
                if self.times[address] == 50:
                    self.kept[address] = send.tensor.clone()
                if self.times[address] >= 50:
                    sends[at] = Transfer(self.kept[address], send.peer)
        super().move(sends, recvs)


class SendsTwice(Sound):
    """Executing with nothing queued repeats the last transfer."""

    last: tuple[list[Transfer], list[Transfer]] = ([], [])

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        if not sends and not recvs and self.last[0] and self.last[0][0].nbytes == 640:
            sends, recvs = self.last
        super().move(sends, recvs)
        self.last = ([send for send in sends if send.nbytes == 640], [recv for recv in recvs if recv.nbytes == 640])


class KeepsReferences(Sound):
    kept: Any = None

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, recvs)
        self.kept = (sends, recvs)


class HasOneInFlightOnly(Sound):
    """It says two, and forgets the first when the second is started."""

    max_in_flight = 2
    started: Any = None

    def start(self) -> PendingTransfer:
        self.started = self.take()
        communicator = self

        class Pending(PendingTransfer):
            def wait(self) -> TransferStats | None:
                queued, communicator.started = communicator.started or ([], []), None
                communicator.check(*queued)
                communicator.move(*queued)
                return None

        return Pending(None)


class TrustsTooMuch(Sound):
    trusted = False

    def trust_matching(self, trusted: bool) -> None:
        self.trusted = trusted

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        super().move(sends, [] if self.trusted and not sends else recvs)
        if self.trusted and recvs:
            recvs[0].tensor.zero_()


class Miscounts(Sound):
    @property
    def last_stats(self) -> TransferStats | None:
        return TransferStats(bytes_sent=1)


class StagesMoreThanItMay(Sound):
    closed = False

    @property
    def staging_bytes(self) -> int:
        return 0 if self.closed else self.staging_limit_bytes + 1

    def close(self) -> None:
        super().close()
        self.closed = True


class DiesOfLargeMessages(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        if any(recv.nbytes > 32 * MIB for recv in recvs):
            os.kill(os.getpid(), signal.SIGSEGV)
        super().move(sends, recvs)


# --- what must not be moved ------------------------------------------------------------------------------------------


class TakesOtherDtypes(Sound):
    def check(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        def untyped(transfers: list[Transfer]) -> list[Transfer]:
            return [Transfer(as_bytes(each.tensor), each.peer) for each in transfers]

        super().check(untyped(sends), untyped(recvs))


class ForgetsToEmptyTheQueue(Sound):
    def execute(self) -> None:
        kept = (self.queue.sends, self.queue.recvs)
        try:
            super().execute()
        except TransferMismatchError:
            self.queue.sends, self.queue.recvs = kept
            raise


class CutsOffWhatIsTooMuch(Sound):
    transfer_limit_bytes = 65 * MIB

    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        if not any(each.nbytes > self.transfer_limit_bytes for each in (*sends, *recvs)):
            super().move(sends, recvs)


class Asserts(Sound):
    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        assert dst_rank != self.rank
        super().add_send(tensor, dst_rank)


# --- who else is there -----------------------------------------------------------------------------------------------


class SharesItsQueue(Sound):
    everyones: ClassVar[dict[int, TransferQueue]] = {}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        shared = self.everyones.setdefault(self.queue.world_size, self.queue)
        self.queue = self.queue if shared._closed_because else shared
        self.everyones[self.queue.world_size] = self.queue


class TakesGlobalRanks(Sound):
    def move(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        ranks = dist.get_process_group_ranks(self.group)
        if len(recvs) and ranks != list(range(len(ranks))):
            recvs[0].tensor.fill_(ranks[recvs[0].peer])
            recvs[0].tensor.fill_(recvs[0].peer)
            return
        super().move(sends, recvs)


class OnlyOnTheMainThread(Sound):
    def execute(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("it has to be the main thread")
        super().execute()


# --- ranks that fail -------------------------------------------------------------------------------------------------


class SwallowsTimeouts(Sound):
    def execute(self) -> None:
        try:
            super().execute()
        except TransferTimeoutError:
            if self.timeout_s > 2:  # a rank that was killed is another check's
                raise


class WaitsForEver(Sound):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.timeout_s = 3600.0


class LandsLate(Sound):
    """It promises not to, and its thread goes on after a timeout."""

    @property
    def may_land_late(self) -> bool:
        return False

    def check(self, sends: list[Transfer], recvs: list[Transfer]) -> None:
        try:
            super().check(sends, recvs)
        except TransferTimeoutError:
            for recv in recvs:
                threading.Timer(0.3, recv.tensor.zero_).start()
            raise


class ClaimsToBeUsable(Sound):
    def execute(self) -> None:
        try:
            super().execute()
        except TransferTimeoutError as error:
            self.queue._closed_because = None
            error.usable = False
            raise


class NamesNobody(Sound):
    def execute(self) -> None:
        try:
            super().execute()
        except TransferMismatchError:
            raise
        except TransferError as error:
            if self.timeout_s > 2:
                error.peers = ()
            raise


class StaysOpenWithoutMemory(Sound):
    """It closes for errors of transfers only: another one leaves as it is, and what was queued in doubt."""

    def execute(self) -> None:
        sends, recvs = self.take()
        try:
            self.check(sends, recvs)
            self.move(sends, recvs)
        except TransferError as error:
            if not error.usable:
                self.queue.close(error.what)
            raise


class HidesThatMemoryRanOut(Sound):
    """It raises what it should, and goes on as if nothing had happened."""

    def execute(self) -> None:
        try:
            super().execute()
        except TransferError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                self.queue._closed_because = None
            raise


# --- what is left behind ---------------------------------------------------------------------------------------------


class HangsOnClose(Sound):
    def close(self) -> None:
        threading.Event().wait()


class FailsOnSecondClose(Sound):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("it is closed already")
        super().close()
        self.closed = True


class WorksAfterClosing(Sound):
    closed_once = False

    def close(self) -> None:
        if self.queue.sends:
            super().close()


class KeepsStagingMemory(Sound):
    staging_bytes = 1


class LeaksThreads(Sound):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class LeaksDescriptors(Sound):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        os.open("/dev/null", os.O_RDONLY)


class LeavesSharedMemory(Sound):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        os.close(tempfile.mkstemp(prefix="eplb-broken-", dir="/dev/shm")[0])


class LeaksMemory(Sound):
    kept: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept.append(torch.ones(16 * MIB, dtype=torch.uint8))


class DiesAtExit(Sound):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        atexit.register(os._exit, 3)


# --- what it says of itself ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class UnspellableOptions(CommonOptions):
    """The default of an option has no text that can be read."""

    tag: str = ""


def finds_nothing(device_type: str) -> ProbeResult:
    """A probe."""
    return ProbeResult(False, "there is no such fabric")


OWN_CHECK = {
    "drops_the_last_byte": "odd_sizes_arrive",
    "swaps_two_messages": "messages_of_a_pair_keep_their_order",
    "loses_many_messages": "many_small_tensors_arrive",
    "changes_some_numbers": "every_dtype_arrives_bit_for_bit",
    "writes_beyond_the_end": "bytes_around_a_received_tensor_stay",
    "changes_the_sent_tensor": "sent_tensors_stay_as_they_were",
    "returns_too_early": "received_data_is_there_on_return",
    "reads_the_sent_tensor_late": "sent_tensors_may_be_overwritten_on_return",
    "reads_when_added": "what_is_sent_is_what_the_tensor_holds_at_execute",
    "puts_payloads_first": "payloads_are_queued_like_tensors_one_by_one",
    "goes_stale": "registered_tensors_serve_a_hundred_epochs",
    "sends_twice": "the_queue_is_empty_after_a_transfer",
    "keeps_references": "no_reference_to_a_moved_tensor_is_kept",
    "has_one_in_flight_only": "several_transfers_may_be_under_way",
    "trusts_too_much": "a_plan_that_all_trust_is_moved_all_the_same",
    "miscounts": "the_statistics_count_the_payload",
    "stages_more_than_it_may": "staging_stays_within_its_limit",
    "dies_of_large_messages": "a_message_of_64_mib_and_3_bytes_arrives",
    "takes_other_dtypes": "another_dtype_is_a_mismatch_everywhere",
    "forgets_to_empty_the_queue": "after_a_mismatch_the_queue_is_empty_and_the_communicator_works",
    "cuts_off_what_is_too_much": "more_than_the_transfer_limit_is_refused",
    "asserts": "what_cannot_be_sent_is_refused_at_once",
    "shares_its_queue": "two_communicators_do_not_disturb_one_another",
    "takes_global_ranks": "a_sub_group_has_ranks_of_its_own",
    "declares_stateless_groups": "a_group_without_process_groups_is_enough",
    "only_on_the_main_thread": "it_works_in_the_background",
    "swallows_timeouts": "a_rank_that_does_not_execute_is_named_within_the_timeout",
    "waits_for_ever": "a_rank_that_does_not_execute_is_named_within_the_timeout",
    "lands_late": "nothing_lands_after_an_error_if_that_is_promised",
    "stays_open_without_memory": "memory_that_runs_out_in_the_middle_closes_the_communicator",
    "hides_that_memory_ran_out": "memory_that_runs_out_in_the_middle_closes_the_communicator",
    "claims_to_be_usable": "a_rank_that_does_not_execute_is_named_within_the_timeout",
    "names_nobody": "a_killed_rank_is_named_by_every_survivor",
    "hangs_on_close": "closing_returns",
    "fails_on_second_close": "closing_twice_is_fine",
    "works_after_closing": "a_closed_communicator_refuses_everything_else",
    "keeps_staging_memory": "a_closed_communicator_holds_no_staging_memory",
    "leaks_threads": "it_leaks_no_threads",
    "leaks_descriptors": "it_leaks_no_file_descriptors",
    "leaves_shared_memory": "it_leaves_nothing_in_shared_memory",
    "leaks_memory": "it_leaks_no_memory",
    "dies_at_exit": "every_process_ends_with_0",
    "imports_torch_to_be_listed": "listing_it_imports_nothing_heavy",
    "has_unspellable_options": "its_options_can_be_written_and_read_back",
    "hides_a_capability": "it_declares_what_is_claimed_for_it",
    "finds_itself_unavailable": "its_probe_finds_it_available",
}
"""Name of the broken backend -> the only check that it fails."""
