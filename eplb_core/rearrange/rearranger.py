"""From two placements to moved weights: runs a schedule, step by step, over any communicator.

A step's bytes land in a window. They are committed to the slots once every rank has received its own, by one record
that no two ranks can read differently (`eplb_core.control.commit_record`). So after any failure every slot of every
surviving rank holds what `error.placement` says, and that is the same on all of them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.cuda_stream import as_cuda_stream
from eplb_core.control.agreement import not_all_answered
from eplb_core.control.call import Call, Calls
from eplb_core.control.commit_record import CommitRecord, Record
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    BackendUnavailableError,
    ControlPlaneError,
    HandshakeError,
    InputError,
    IntegrityError,
    TransferError,
)
from eplb_core.planning.generations import as_mapping, remap_placement, reverse_mapping
from eplb_core.planning.placement import EMPTY, as_array
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.rearrange.agree_on_plan import Agreed, agree_on_plan, as_problem, refuse, stands
from eplb_core.rearrange.decisions import Decisions
from eplb_core.rearrange.host_backup import HostBackup
from eplb_core.rearrange.job import RearrangeJob
from eplb_core.rearrange.job_receiver import Receiver
from eplb_core.rearrange.job_state import JobState
from eplb_core.rearrange.known_plan import KnownPlan, KnownPlans
from eplb_core.rearrange.live import LiveCheck, compare_live
from eplb_core.rearrange.lost_experts import Loader, load_lost
from eplb_core.rearrange.pace import Pace, parse_pace
from eplb_core.rearrange.reporter import Reporter
from eplb_core.rearrange.result import RearrangeResult
from eplb_core.rearrange.run import Run, step_key
from eplb_core.rearrange.shared_schedule import share_cuts
from eplb_core.rearrange.step_runner import PhaseTimes, StepRunner
from eplb_core.rearrange.verify import (
    THOROUGHNESS,
    Thoroughness,
    check_end,
    expected_checksums,
    own_checksums,
    slot_checksums,
)
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.rearrange.window import cut_window
from eplb_core.scheduling.schedule import ALIGNMENT, Step, schedule_steps

InPlace = Literal["never", "auto", "always"]
_STEP_COSTS = {"cpu": 24 << 20, "cuda": 1 << 30}
"""Bytes that are staged and copied in the time that an additional step takes, by the kind of device."""

_MOST_FORGOTTEN = 8
"""How many last questions of earlier rearrangements may wait at the store for a moment in which this rank waits."""

_as_usual = torch.inference_mode(False)
"""In any mode of the engine: a job's thread could not write to what is made under inference mode."""

LAYERS_IN_FLIGHT = 2
"""How many layers a background job holds received and not yet committed, unless it is told otherwise."""


class _Scheduling(NamedTuple):
    """What a schedule depends on beside the plan."""

    window_bytes: int
    limit_bytes: int | None
    max_layers: int | None
    in_place_from: int | None


class Rearranger:
    """Moves the experts of one model between the ranks of a communicator's group. Keep it: its window is reused.

    Args:
        communicator: made by `create_eplb_communicator`; stays the caller's to close.
        weights: `weights[layer][tensor]`, first dimension = local slots. Layers may differ in shapes and dtypes.
        window_bytes: staging memory of this rank; None takes what the communicator's configuration allows.
        node_of_rank: node number of each rank, so that sources on the same node are preferred.
        relay: whether an expert that several ranks of one node need crosses to that node once, and is passed on
            there; None means yes where `node_of_rank` is given.
        in_place: whether `run` gives up slots whose expert has another copy, and receives into them directly, which
            saves the copy out of the window and takes more steps. `auto`: where that is faster, if the communicator
            promises that nothing lands late (`may_land_late`). After a failure more slots may be empty then; no
            expert is ever without a copy.

    Raises:
        InputError: the weights, or the window, cannot be used.
    """

    @_as_usual
    def __init__(
        self,
        communicator: EplbCommunicator,
        weights: Sequence[Sequence[torch.Tensor]],
        *,
        window_bytes: int | None = None,
        node_of_rank: Sequence[int] | None = None,
        relay: bool | None = None,
        in_place: InPlace = "auto",
    ) -> None:
        if not hasattr(type(communicator), "binding"):
            raise InputError(
                f"the communicator of a Rearranger is a {type(communicator).__name__}",
                remedy="give Rearranger(communicator, weights), with what create_eplb_communicator returned",
            )
        binding = communicator.binding
        context = binding.context
        self._communicator = communicator
        # All rearrangers of a communicator have their calls in common: ranks may have made another number of them.
        self._control: ControlPlane = context.control.scoped("rearrangements")
        self._calls: Calls = binding.shared.setdefault("rearrangements", Calls(self._control, stands))
        self._attempt = binding.next_attempt()
        try:
            self._weights = self._checked_weights(weights, context.device)
            if window_bytes is not None:
                _check_whole(window_bytes, "window_bytes", least=1)
            self._in_place_from = self._weigh_in_place(in_place)
            self._node_of_rank = None if node_of_rank is None else [int(node) for node in node_of_rank]
            if self._node_of_rank is not None:
                self._check_nodes(self._node_of_rank, context.world_size)
        except Exception as error:
            problem = as_problem(error, "an argument of the rearranger cannot be used")
            refuse(self._calls, problem, self._attempt)
            if problem is error:
                raise
            raise problem from error
        self._rank = context.rank
        self._world_size = context.world_size
        self._relay = relay
        self._timeout_s = binding.timeout_s
        self._runner = StepRunner(communicator, self._weights, self._rank)
        self._beside: ControlPlane | None = None
        self._plans = KnownPlans()
        self._decisions: Decisions = binding.shared.setdefault("decisions", Decisions(self._timeout_s))
        self._stream: torch.cuda.Stream | None = None
        self._job: RearrangeJob | None = None
        self._placement: IntArray | None = None
        self._known = False  # whether the slots are what `_placement` says, or that is what the caller has said
        self._leftovers: list[Callable[[], None]] = []
        self._ended_job: RearrangeJob | None = None  # whose records are at the store until all ranks call again
        self._remembered: tuple[Literal["sample", "full"], dict[tuple[int, int], int]] | None = None
        self._forgotten: deque[Callable[[], None]] = deque()
        self._window = self._allocate(communicator.staging_limit_bytes if window_bytes is None else window_bytes)
        communicator.register(self._weights.tensors, landing=self._in_place_from is not None)
        communicator.register([self._window], landing=True)
        with contextlib.suppress(ControlPlaneError):  # the next call raises it
            self._calls.unsay()

    @property
    def window_bytes(self) -> int:
        """Bytes of the window that received experts land in: what is allowed, or less if the weights are less."""
        return self._window.numel()

    @property
    def placement(self) -> IntArray | None:
        """What the slots hold after the last rearrangement, however it ended; None before the first."""
        if self._job is not None:
            return self._job.placement
        return None if self._placement is None else self._placement.copy()

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Run transfers and copies on `stream`, as `EplbCommunicator.set_stream`; None means the current stream."""
        self._refuse_beside_a_job()
        self._communicator.set_stream(stream)
        self._stream = None if stream is None else as_cuda_stream(stream)

    @_as_usual
    def run(
        self,
        old: npt.ArrayLike | None,
        new: npt.ArrayLike,
        *,
        ranks_before: Mapping[int, int] | None = None,
        ranks_after: Mapping[int, int] | None = None,
        keep_slots: bool = False,
        weights_changed: bool = False,
        loader: Loader | HostBackup | None = None,
        verify: Thoroughness = "off",
        progress: Callable[[int, int], None] | None = None,
    ) -> RearrangeResult:
        """Move the weights from placement `old` to placement `new`. Every rank calls it with the same two.

        On a GPU the last copies may still be under way on the stream when it returns.

        Args:
            old: int64 `[layers, slots]`, what every slot holds now, -1 for empty ones; on any device. None for
                `self.placement`.
            new: int64 `[layers, slots]`, what every slot shall hold.
            ranks_before: rank of the group that `old` speaks of -> its rank in this group, for each rank that is in
                both. None if that is this group. Slots of ranks that joined are empty, those of ranks that left gone.
            ranks_after: rank of this group -> its rank in the group that `new` speaks of, for those that stay. The
                slots of ranks that leave end up empty; `result.placement` speaks of this group.
            keep_slots: let an expert that stays on a rank keep its slot, wherever `new` has it on that rank. Then
                `result.placement` is where the experts are.
            weights_changed: the caller has written to the slots since this rearranger did, so that `old` may differ
                from `self.placement`. Without it, such an `old` is an error: it is most likely an older one, and
                experts would be taken from slots that hold others.
            loader: brings the experts that no slot of `old` holds: called with `(layer, expert)` on each rank that
                needs one, returns its tensors; or a `HostBackup`. Without it they are an error.
            verify: compare checksums of all experts before and after: not at all, of samples, of all bytes.
            progress: called after every step with the bytes that this rank has received and those that it will.

        Raises:
            PlacementError: a placement is not valid on any rank, or the window is too small for one expert.
            LostExpertsError: `new` needs experts that no slot of `old` holds, and there is no loader, or it failed.
            InputError: the placements do not fit the weights, or `old` is not what the slots hold.
            HandshakeError: the ranks were given different placements or weights, one of them cannot use what it was
                given, or one did not call. Nothing was moved, and all of them can call again.
            TransferError: a step failed. `error.placement` is what the slots hold, the same on every rank that
                survives; `DecisionUnknownError` if the store died with its host.
            IntegrityError: with `verify`, experts differ from what they were; `error.placement` has -1 there.
        """
        began = time.perf_counter()

        def check() -> dict[str, str]:
            if verify not in THOROUGHNESS:
                raise InputError(f"verify must be one of {', '.join(THOROUGHNESS)}, not {verify!r}")
            if loader is not None and not isinstance(loader, HostBackup) and not callable(loader):
                raise InputError(f"the loader is a {type(loader).__name__}, which cannot be called")
            return {"call": "run", "verify": verify, "in_place": str(self._in_place_from)}

        scheduling = _Scheduling(self.window_bytes, self._communicator.transfer_limit_bytes, None, self._in_place_from)
        call, agreed = self._agreed_plan(
            old,
            new,
            check,
            ranks_before=ranks_before,
            ranks_after=ranks_after,
            keep_slots=keep_slots,
            weights_changed=weights_changed,
            loads=loader is not None,
            scheduling=lambda: scheduling,
        )
        plan, steps = agreed.known.plan, self._schedule(agreed, call, scheduling)
        record = self._record(agreed, call)
        run = Run(
            steps,
            self._window,
            plan.old.copy(),
            record,
            self._communicator,
            self._runner,
            Reporter(self._communicator, self._runner, steps, plan.num_layers),
            self._stream,
        )
        run.times.add("plan", time.perf_counter() - began)
        self._job = None
        run.reporter.started()
        try:
            expected = self._checksums_before(plan, call, verify, run)
            run.perform(progress)
            if len(plan.lost) and loader is not None:
                self._load(plan, run, loader, record)
            if expected is not None:
                self._check_after(run, call, expected, verify)
        except BaseException as error:
            self._hold(run.placement)
            if isinstance(error, TransferError | HandshakeError | ControlPlaneError) and error.placement is None:
                error.placement = run.placement.copy()
            run.reporter.failed(error, run.decided)
            raise
        self._hold(run.placement)
        if steps:
            self._leftovers.append(lambda: record.forget(step_key(len(steps) - 1)))
        result = self._summary(agreed.known, steps, run.times, time.perf_counter() - began).at(run.placement)
        run.reporter.finished(result)
        return result

    @_as_usual
    def start(
        self,
        old: npt.ArrayLike | None,
        new: npt.ArrayLike,
        *,
        ranks_before: Mapping[int, int] | None = None,
        ranks_after: Mapping[int, int] | None = None,
        keep_slots: bool = False,
        weights_changed: bool = False,
        pace: str | float | None = None,
        max_inflight_layers: int = LAYERS_IN_FLIGHT,
        commit_timeout_s: float = 600.0,
    ) -> RearrangeJob:
        """Begin to move the weights beside inference, and return the job. Every rank calls it with the same values.

        A thread of its own receives into the window, on a stream of its own. Live weights change in
        `RearrangeJob.commit` and `RearrangeJob.wait` alone, which the engine calls when it likes. Until the job has
        ended, neither this rearranger nor its communicator can be used otherwise.

        Args:
            old: as in `run`.
            new: as in `run`.
            ranks_before: as in `run`.
            ranks_after: as in `run`.
            keep_slots: as in `run`.
            weights_changed: as in `run`.
            pace: the most bytes that a rank receives a second: a number, or text such as `20GB/s`. None for no limit.
            max_inflight_layers: how many layers (or parts of layers that are larger than the window) may be received
                and not yet committed; the window is shared among them.
            commit_timeout_s: the longest that any rank may take to commit what is ready, in seconds; then the job
                fails on all.

        Raises:
            BackendUnavailableError: the backend cannot run beside inference.
            InputError: the pace, or the number of layers, cannot be used; or as `run`.
            PlacementError, LostExpertsError, HandshakeError: as `run`.
        """
        beside = self._control_beside_a_thread()

        def check() -> dict[str, str]:
            self._check_background()
            _check_whole(max_inflight_layers, "max_inflight_layers", least=1)
            _check_seconds(commit_timeout_s, "commit_timeout_s")
            bytes_per_s = None if pace is None else parse_pace(pace)
            if bytes_per_s is not None and Pace(bytes_per_s).burst_s > self._timeout_s / 2:
                raise InputError(
                    f"at a pace of {bytes_per_s:g} bytes a second a rank would seem to be dead",
                    why=f"{Pace(bytes_per_s).burst_bytes} bytes would take longer than half the timeout, "
                    f"{self._timeout_s:g} s",
                    remedy="give a faster pace, or a longer timeout",
                )
            return {"call": "start", "pace": str(bytes_per_s), "max_inflight_layers": str(max_inflight_layers)}

        def parts_of_window() -> list[torch.Tensor]:
            return cut_window(self._window, int(self._weights.expert_bytes.max()), max_inflight_layers)

        def scheduling() -> _Scheduling:
            return _Scheduling(len(parts_of_window()[0]), self._communicator.transfer_limit_bytes, 1, None)

        call, agreed = self._agreed_plan(
            old,
            new,
            check,
            ranks_before=ranks_before,
            ranks_after=ranks_after,
            keep_slots=keep_slots,
            weights_changed=weights_changed,
            loads=False,
            scheduling=scheduling,
        )
        parts = parts_of_window()
        plan, steps = agreed.known.plan, self._schedule(agreed, call, scheduling())
        state = JobState(steps, parts, plan.old.copy())
        receiver = Receiver(
            state,
            self._runner,
            self._communicator,
            call,
            timeout_s=self._timeout_s,
            commit_timeout_s=commit_timeout_s,
            bytes_per_s=None if pace is None else parse_pace(pace),
            device=self._weights.device,
        )
        self._job = RearrangeJob(
            plan,
            state,
            receiver,
            self._runner,
            self._communicator,
            CommitRecord(beside.scoped(call.name), self._timeout_s),
            timeout_s=self._timeout_s,
            epoch=call.number,
            device=self._weights.device,
            engine_stream=self._stream,
            summarize=lambda account, seconds: self._summary(agreed.known, steps, account, seconds),
        )
        self._known = True
        self._ended_job = self._job
        self._job.begin()
        return self._job

    def _check_background(self) -> None:
        binding = self._communicator.binding
        if not binding.background:
            name = binding.config.partition("?")[0]
            raise BackendUnavailableError(
                f"backend {name!r} cannot run beside inference",
                name=name,
                why="it declares no background capability; NCCL's kernels, for one, take turns with those of the "
                "engine's own collectives on the same GPU, and two such groups on different streams can deadlock",
                remedy="use run() between batches, or a backend that can: 'eplb backends' lists what each can do",
            )

    # --- between rearrangements -------------------------------------------------------------------------------------

    def refresh(
        self, loaded: npt.ArrayLike, current: npt.ArrayLike, *, verify: Thoroughness = "off"
    ) -> RearrangeResult:
        """Put experts where the router looks for them, after a loader has written all of them where it thinks they are.

        Engines load weights by their first placement, also when experts have moved since. Every rank calls this.

        Args:
            loaded: int64 `[layers, slots]`, where the loader has written the experts.
            current: int64 `[layers, slots]`, where the router looks for them.
            verify: as in `run`.

        Raises:
            EplbError: as `run`.
        """
        self._remembered = None  # these are other weights
        return self.run(loaded, current, verify=verify, weights_changed=True)

    @contextlib.contextmanager
    def refreshing(self, loaded: npt.ArrayLike, current: npt.ArrayLike) -> Iterator[None]:
        """Let a loader write any part of the experts within the block: they are where it expects them, and go back.

        Whatever happens in the block, experts go back to where the router looks for them::

            with rearranger.refreshing(initial, current):
                model.load_weights(patches)

        Args:
            loaded: as in `refresh`.
            current: as in `refresh`.

        Raises:
            EplbError: as `run`.
        """
        self.run(current, loaded)
        try:
            yield
        finally:
            self.refresh(loaded, current)

    @_as_usual
    def remember(self, placement: npt.ArrayLike, *, thoroughness: Literal["sample", "full"] = "full") -> None:
        """Keep checksums of all experts as they are, for `verify_live`; `refresh` forgets them. Every rank calls it.

        Args:
            placement: int64 `[layers, slots]`, what the slots hold.
            thoroughness: look at samples of each tensor, or at all bytes.

        Raises:
            InputError: the placement does not fit the weights.
            IntegrityError: copies of an expert differ.
            ControlPlaneError: a rank did not come, or the store is gone.
        """
        placed = self._placed(placement)
        sums = slot_checksums(
            self._weights,
            self._control_for_a_look(),
            sample=thoroughness == "sample",
            stream=self._stream,
            timeout_s=2 * self._timeout_s,
        )
        self._remembered = thoroughness, expected_checksums(placed, sums)

    @_as_usual
    def verify_live(
        self, placement: npt.ArrayLike | None = None, *, thoroughness: Literal["sample", "full"] = "full"
    ) -> LiveCheck:
        """Compare all slots with the placement, and copies of an expert with one another, by checksums.

        Every rank calls it, at any time, also beside a job: each says what its own slots hold. It reads the weights
        once and moves nothing.

        Args:
            placement: int64 `[layers, slots]`, what this rank takes the slots to hold; None for `self.placement`.
            thoroughness: look at samples of each tensor, or at all bytes; what was remembered decides, if anything.

        Raises:
            InputError: there is no placement, or it does not fit the weights.
            ControlPlaneError: a rank did not come, or the store is gone.
            HandshakeError: another rank has other slots.
        """
        known = self.placement if placement is None else placement
        if known is None:
            raise InputError("no placement is known before the first rearrangement", remedy="give the placement")
        mine = slice(self._rank * self._weights.num_slots, (self._rank + 1) * self._weights.num_slots)
        remembered = None
        if self._remembered is not None:
            thoroughness, remembered = self._remembered
        sums = own_checksums(self._weights, sample=thoroughness == "sample", stream=self._stream)
        return compare_live(
            self._control_for_a_look(), self._placed(known)[:, mine], sums, remembered, 2 * self._timeout_s
        )

    def _control_for_a_look(self) -> ControlPlane:
        """Return a control plane of its own for one look at the slots, which a job's thread does not wait on."""
        looks = self._control_beside_a_thread().scoped("looks")
        shared = self._communicator.binding.shared
        calls: Calls = shared.setdefault("looks", Calls(looks))  # numbered at the store, as rearrangements are
        call, _ = calls.meet("which slots are looked at", b"", 2 * self._timeout_s)
        return call

    def _placed(self, placement: npt.ArrayLike) -> IntArray:
        placed = np.ascontiguousarray(placement, dtype=np.int64)
        expected = (len(self._weights.layers), self._world_size * self._weights.num_slots)
        if placed.shape != expected:
            raise InputError(f"the placement has shape {list(placed.shape)}, the weights need {list(expected)}")
        return placed

    def _control_beside_a_thread(self) -> ControlPlane:
        """Return the control plane over a connection for this thread, while the job's thread has the other one."""
        if self._beside is None:
            try:
                self._beside = self._control.with_own_connection(self._timeout_s)
            except ControlPlaneError as error:
                raise not_all_answered(error, self._world_size) from error
        return self._beside

    # --- the steps --------------------------------------------------------------------------------------------------

    def _schedule(self, agreed: Agreed, control: ControlPlane, how: _Scheduling) -> list[Step]:
        """Return the steps. Ranks that lack them work them out together, so one uses what it knows only if all can."""
        known = agreed.known
        if agreed.scheduled:
            return known.steps[how]
        try:
            known.steps[how] = schedule_steps(
                known.plan,
                self._weights.expert_bytes,
                window_bytes=how.window_bytes,
                send_limit_bytes=how.limit_bytes,
                recv_limit_bytes=how.limit_bytes,
                max_layers_per_step=how.max_layers,
                in_place_from=how.in_place_from,
                share=lambda cut, groups: share_cuts(control, cut, groups, self._timeout_s),
            )
        except HandshakeError as error:
            error.placement = known.plan.old.copy()
            raise
        return known.steps[how]

    def _record(self, agreed: Agreed, call: Call) -> Record:
        """Return where the steps are decided, the same for all ranks."""
        try:
            if agreed.known.changes and (journal := self._decisions.journal(call, agreed.notes)) is not None:
                return journal
        except HandshakeError as error:
            error.placement = agreed.known.plan.old.copy()
            raise
        return CommitRecord(call, self._timeout_s, self._forgotten)

    # --- before and after -------------------------------------------------------------------------------------------

    def _checksums_before(
        self, plan: RearrangementPlan, control: ControlPlane, verify: Thoroughness, run: Run
    ) -> dict[tuple[int, int], int] | None:
        if verify == "off":
            return None
        return expected_checksums(plan.old, self._checksums(run, control, verify))

    def _check_after(
        self, run: Run, control: ControlPlane, expected: dict[tuple[int, int], int], verify: Thoroughness
    ) -> None:
        try:
            check_end(run.placement, self._checksums(run, control, verify), expected, self._weights.num_slots)
        except IntegrityError as error:
            if error.placement is not None:
                run.placement = error.placement.copy()
            raise

    def _checksums(self, run: Run, control: ControlPlane, verify: Thoroughness) -> IntArray:
        began = time.perf_counter()
        sums = slot_checksums(
            self._weights,
            control,
            sample=verify == "sample",
            stream=self._stream,
            timeout_s=2 * self._timeout_s,
        )
        run.times.add("verify", time.perf_counter() - began)
        return sums

    def _load(self, plan: RearrangementPlan, run: Run, loader: Loader | HostBackup, record: Record) -> None:
        began = time.perf_counter()
        run.placement = load_lost(plan.lost, run.placement, self._weights, self._rank, loader, record, self._stream)
        run.times.add("load", time.perf_counter() - began)

    def _summary(self, known: KnownPlan, steps: Sequence[Step], times: PhaseTimes, seconds: float) -> RearrangeResult:
        plan = known.plan
        if known.bytes_moved is None:
            sizes = self._weights.payload_bytes
            local = sizes[plan.move_layer[plan.move_source >= 0]]
            known.bytes_moved = plan.bytes_moved(sizes), int(local.sum())
        return RearrangeResult(
            placement=plan.new,
            moved=plan.num_transfers,
            moved_locally=plan.num_local_moves,
            bytes_moved=known.bytes_moved[0],
            bytes_moved_locally=known.bytes_moved[1],
            seconds=seconds,
            steps=len(steps),
            staging_bytes=self.window_bytes + self._communicator.staging_bytes,
            phases=times.phases,
            paths=times.paths,
        )

    # --- checks -----------------------------------------------------------------------------------------------------

    def _weigh_in_place(self, in_place: InPlace) -> int | None:
        """Return the bytes of staging that an additional step is worth; None to stage everything."""
        if in_place not in ("never", "auto", "always"):
            raise InputError(f"in_place must be never, auto or always, not {in_place!r}")
        possible = not self._communicator.may_land_late
        if in_place == "always" and not possible:
            raise InputError(
                "experts cannot be received in place",
                why="the communicator makes no promise that nothing lands late",
                remedy="use in_place='auto'",
            )
        if in_place == "never" or not possible:
            return None
        return 1 if in_place == "always" else _STEP_COSTS.get(self._weights.device.type, _STEP_COSTS["cuda"])

    @staticmethod
    def _checked_weights(weights: Sequence[Sequence[torch.Tensor]], device: torch.device) -> ExpertWeights:
        checked = ExpertWeights(weights)
        if checked.device != device:
            raise InputError(f"the weights lie on {checked.device}, the communicator moves tensors on {device}")
        return checked

    @staticmethod
    def _check_nodes(node_of_rank: Sequence[int], world_size: int) -> None:
        if len(node_of_rank) != world_size:
            raise InputError(f"node_of_rank has {len(node_of_rank)} numbers, and there are {world_size} ranks")

    def _allocate(self, allowed: int) -> torch.Tensor:
        one_each = -(-self._weights.expert_bytes // ALIGNMENT) * ALIGNMENT
        everything = int(one_each.sum()) * self._weights.num_slots
        return torch.empty(min(allowed, everything), dtype=torch.uint8, device=self._weights.device)

    def _refuse_beside_a_job(self) -> None:
        if self._job is not None and not self._job.ended:
            raise InputError(
                "a background job of this rearranger has not ended",
                remedy="call its wait(), or cancel() and then wait(), first",
            )

    def _agreed_plan(
        self,
        old: npt.ArrayLike | None,
        new: npt.ArrayLike,
        check: Callable[[], dict[str, str]],
        *,
        ranks_before: Mapping[int, int] | None,
        ranks_after: Mapping[int, int] | None,
        keep_slots: bool,
        weights_changed: bool,
        loads: bool,
        scheduling: Callable[[], _Scheduling],
    ) -> tuple[Call, Agreed]:
        """Return the call and the plan, once all ranks have the same one.

        All that may be wrong with a call is found in here, so that all ranks hear of it at once.
        """
        asked = {
            "weights": self._weights.description,
            "window": f"{self.window_bytes} bytes",
            "nodes": str(self._node_of_rank),
            "relay": str(self._relay),
            "loader": "yes" if loads else "no",
        }

        def make_plan() -> RearrangementPlan:
            plan = plan_rearrangement(
                self._before(old, ranks_before),
                self._carried(as_array(new), None if ranks_after is None else reverse_mapping(as_mapping(ranks_after))),
                self._world_size,
                self._node_of_rank,
                relay=self._relay,
                keep_slots=keep_slots,
                missing="leave_empty" if loads else "raise",
            )
            self._check_shape(plan)
            return plan

        def known_plan() -> KnownPlan:
            self._refuse_beside_a_job()
            asked.update(check())
            self._weights.check_places()
            if old is None or ranks_before is not None or ranks_after is not None:
                known = KnownPlan.of(make_plan())
            else:
                known = self._plans.find(as_array(old), as_array(new), (keep_slots, loads), make_plan)
            if not weights_changed:
                self._refuse_stale(known.plan.old)
            return known

        try:
            call, agreed = agree_on_plan(
                self._calls,
                self._control,
                known_plan,
                asked,
                self._timeout_s,
                self._attempt,
                lambda known: scheduling() in known.steps,
                note=self._decisions.note,
                asks_store=not self._decisions.have_journal,
            )
        except HandshakeError as error:
            if not self._known and error.placement is not None and "old placement" not in error.table:
                self._placement = error.placement.copy()
            raise
        self._decisions.clear(call)
        if self._rank == 0:  # every rank has come here since
            if self._ended_job is not None:
                self._ended_job.forget()
            self._forgotten.extend(self._leftovers)
            while len(self._forgotten) > _MOST_FORGOTTEN:
                self._forgotten.popleft()()
        self._leftovers, self._ended_job = [], None
        return call, agreed

    def _hold(self, placement: IntArray) -> None:
        """Remember what the slots hold."""
        self._placement, self._known = placement, True

    def _before(self, old: npt.ArrayLike | None, ranks_before: Mapping[int, int] | None) -> npt.ArrayLike:
        if old is not None:
            return self._carried(as_array(old), None if ranks_before is None else as_mapping(ranks_before))
        if not self._known or self.placement is None:
            raise InputError(
                "what the slots hold is not known yet", remedy="give the placement that they were filled by as `old`"
            )
        return self.placement

    def _refuse_stale(self, old: IntArray) -> None:
        """Raise if a slot holds another expert than `old` says: it would be taken for that one, silently."""
        holds = self._placement if self._job is None else self._job.placement
        if not self._known or holds is None or holds.shape != old.shape or np.array_equal(holds, old):
            return
        wrong = np.argwhere((old != holds) & (old != EMPTY))
        if len(wrong):
            layer, slot = wrong[0].tolist()
            more = f", and {len(wrong) - 1} other slots differ" if len(wrong) > 1 else ""
            held = "nothing" if holds[layer, slot] == EMPTY else f"expert {holds[layer, slot]}"
            raise InputError(
                f"`old` says that slot {slot} of layer {layer} holds expert {old[layer, slot]}; it holds {held}{more}",
                why="after the last rearrangement the slots hold what rearranger.placement says",
                remedy="give None for it; or weights_changed=True, if you have written to the slots since",
            )

    def _carried(self, placement: npt.ArrayLike, here: Mapping[int, int] | None) -> npt.ArrayLike:
        """Return a placement in the ranks of this group."""
        if here is None:
            return placement
        slots = np.asarray(placement).shape[-1] if np.ndim(placement) == 2 else 0
        return remap_placement(placement, slots // max(self._weights.num_slots, 1), here, self._world_size)

    def _check_shape(self, plan: RearrangementPlan) -> None:
        here = (len(self._weights.layers), self._weights.num_slots)
        there = (plan.num_layers, plan.slots_per_rank)
        if here != there:
            raise InputError(
                f"the placements have {there[0]} layers of {there[1]} slots a rank, "
                f"the weights {here[0]} layers of {here[1]} slots"
            )


def _check_whole(value: object, name: str, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _check_seconds(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < float(value) < math.inf:
        raise InputError(f"{name} must be a number of seconds above 0, not {value!r}")
