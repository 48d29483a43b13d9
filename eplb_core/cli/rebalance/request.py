"""Turns the user's request into the job of the ranks: reads and checks all input before a rank starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from eplb_core.cli.output import parse_size
from eplb_core.cli.parameters import parse_layers
from eplb_core.errors import BackendUnavailableError, ConfigError, InputError
from eplb_core.inputs.checkpoint import Checkpoint
from eplb_core.inputs.loads import Counts, LoadOptions, RecordedLoads, read_recording
from eplb_core.inputs.models import RandomExperts, find_model, parse_scale, scaled
from eplb_core.inputs.placements import read_placement
from eplb_core.inputs.recording import ModelHints
from eplb_core.inputs.slots import check_same_experts
from eplb_core.planning.placement import check_pair, check_placement, contiguous_placement, imbalance, load_per_rank
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.policies.base import PlacementRequest, decide
from eplb_core.policies.movement import minimize_movement
from eplb_core.policies.worth import CostModel, WorthDecision, should_rebalance
from eplb_core.rearrange.pace import parse_pace
from eplb_core.rearrange.verify import THOROUGHNESS, Thoroughness
from eplb_core.registry.config import AUTO, backend_from_environment, parse_config, resolve_options
from eplb_core.registry.policies import select_policy
from eplb_core.registry.registry import default_registry
from eplb_core.scheduling.schedule import schedule_steps

_GAINS_NOTHING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRequest:
    """The user's request: the options of `eplb rebalance`.

    Attributes:
        loads: the file with the loads.
        checkpoint: the directory with the weights, or None for random ones of `model`.
        part: a word that selects one of several sequences of layers of the checkpoint, or None.
        model: the model whose shapes random weights have, or None.
        scale: the size that each of its tensors is shrunk to.
        verify_against: another copy of the checkpoint, to compare with at the end.
        placement: the file with the placement to start from, or None for the contiguous one.
        ranks: how many ranks.
        nodes: how many nodes they are spread over.
        redundant: slots beyond one for each expert; None for those of `placement`, or 0.
        counts: whether an array in the loads counts logical experts or physical slots.
        window_steps: how many of the last steps of the loads to sum, or None for all.
        decay: the weight of a step relative to the next.
        groups: expert groups that the policy keeps on one node; None for the checkpoint's value, or 1.
        policy: a config string of the policy; None for `incremental` if there is a placement to start from, else
            `deepseek`.
        as_planned: whether the policy's placement is used unchanged, without relabelling ranks or keeping slots.
        if_worth_it: whether to move nothing unless it pays.
        cost: options of a `CostModel` as in a config string, `key=value&key=value`, or None for the defaults.
        layers: `COUNT` or `START:STOP`, or None for all.
        seed: of the random weights.
        backend: a config string, or None for the environment's, or `auto`.
        window: staging limit of a rank for received experts, as text; None for what the backend allows.
        pace: bytes per second that a background job may bring to a rank, as text; None to run at once.
        verify: how thoroughly checksums are compared before and after: off, sample or full.
        timeout_s: time limit for the whole job, in seconds.
        device: the device of the weights, `cpu` or `cuda`.
    """

    loads: Path
    checkpoint: Path | None = None
    part: str | None = None
    model: str | None = None
    scale: str = "1"
    verify_against: Path | None = None
    placement: Path | None = None
    ranks: int = 4
    nodes: int = 1
    redundant: int | None = None
    counts: str = "logical"
    window_steps: int | None = None
    decay: float = 1.0
    groups: int | None = None
    policy: str | None = None
    as_planned: bool = False
    if_worth_it: bool = False
    cost: str | None = None
    layers: str | None = None
    seed: int = 0
    backend: str | None = None
    window: str | None = None
    pace: str | None = None
    verify: str = "off"
    timeout_s: float = 1800.0
    device: str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class RebalanceTask:
    """The job of the ranks. The rows of its arrays are the layers that take part.

    Attributes:
        weights: the source of the experts: a checkpoint, whose headers were read once, or random weights.
        truth: the source for the comparison at the end.
        layers: for each row, the layer of the source.
        layer_names: for each row, the layer's number in the model.
        loads: float64 `[rows, experts]`.
        old: int64 `[rows, slots]`, the placement to start from.
        new: int64 `[rows, slots]`, the policy's placement.
        num_ranks: how many ranks share the slots.
        node_of_rank: the node of each rank.
        expert_bytes: for each row, the bytes of one expert.
        backend: the config string of the backend.
        window_bytes: staging limit of a rank for received experts; None for what the backend allows.
        timeout_s: the longest that all of it may take, in seconds.
        bytes_per_s: limit on what a background job brings to a rank; None to run at once.
        verify: how thoroughly checksums are compared before and after.
        policy: the canonical config string of the policy.
        plans: for each row, which plan the policy made.
        notes: what was omitted from the loads or the checkpoint, and remarks on the plan.
        worth: whether moving pays.
        device: where the weights lie, `cpu` or `cuda`.
    """

    weights: Checkpoint | RandomExperts
    truth: Checkpoint | RandomExperts
    layers: tuple[int, ...]
    layer_names: tuple[int, ...]
    loads: NDArray[np.float64]
    old: NDArray[np.int64]
    new: NDArray[np.int64]
    num_ranks: int
    node_of_rank: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    worth: WorthDecision
    backend: str
    window_bytes: int | None
    timeout_s: float
    bytes_per_s: float | None = None
    verify: Thoroughness = "off"
    policy: str = ""
    plans: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in one layer."""
        return int(self.old.shape[1]) // self.num_ranks

    def plan(self) -> RearrangementPlan:
        """Return what must move."""
        return plan_rearrangement(self.old, self.new, self.num_ranks, self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """How many nodes the ranks are spread over."""
        return len(set(self.node_of_rank))

    @property
    def rank_bytes(self) -> int:
        """Bytes of the weights of one rank."""
        return self.slots_per_rank * sum(self.expert_bytes)

    def local(self, placement: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
        """Return the columns of a placement that belong to a rank."""
        return placement[:, rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def digest(self) -> str:
        """Return a short text that is the same on ranks that have read the same input."""
        found = hashlib.sha256()
        for array in (self.loads, self.old, self.new):
            found.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        found.update(repr((self.layers, self.node_of_rank, self.expert_bytes)).encode())
        return found.hexdigest()[:16]


def prepare(
    request: RebalanceRequest, open_checkpoint: Callable[[Path, str | None], Checkpoint] = Checkpoint.open
) -> RebalanceTask:
    """Read all input, check it, and let the policy make the new placement.

    Args:
        request: what the user asked for.
        open_checkpoint: opens the part of a checkpoint; under torchrun only rank 0 reads it.

    Raises:
        InputError: some input cannot be used.
        PlacementError: the placement to start from is not valid, or lacks experts.
    """
    _check_counts(request)
    _check_device(request.device)
    checkpoint = None if request.checkpoint is None else open_checkpoint(request.checkpoint, request.part)
    placement = None
    if request.placement is not None:
        placement = read_placement(request.placement, None if checkpoint is None else checkpoint.num_layers)
    recorded = read_recording(request.loads, _load_options(request, checkpoint, placement))
    source, recorded = _match_weights(request, checkpoint, recorded, placement)
    num_layers, num_experts = recorded.loads.shape
    layers = parse_layers(request.layers, num_layers)
    loads, window = recorded.loads[list(layers)], recorded.window[:, list(layers)]
    if not loads.any():
        raise InputError(
            "all loads are zero",
            where=str(request.loads),
            why="nothing was recorded, so no placement is better than another",
            remedy="record loads while the model serves",
        )

    truth = source
    if request.verify_against is not None:
        truth = open_checkpoint(request.verify_against, request.part)
        check_same_experts(source, truth, layers)

    if placement is not None and checkpoint is not None and len(placement) == checkpoint.num_hidden_layers:
        placement = placement[list(checkpoint.layer_ids)]  # SGLang has a row for every layer
    old = _start_placement(request, placement, num_layers, layers, num_experts)
    load_per_rank(old, loads, request.ranks)  # raises if an expert with a load has no copy
    groups = request.groups
    if groups is None:
        groups = source.num_groups if isinstance(source, Checkpoint) else 1
    expert_bytes = tuple(sum(spec.nbytes for spec in source.tensor_specs(layer)) for layer in layers)
    selected = select_policy(_policy_text(request))
    decision = decide(
        selected.policy,
        PlacementRequest(
            loads=window,
            num_slots=old.shape[1],
            num_ranks=request.ranks,
            num_nodes=request.nodes,
            num_groups=groups,
            old=old,
            expert_bytes=np.array(expert_bytes),
        ),
    )
    old, new = check_pair(old, decision.placement, request.ranks)
    if not request.as_planned:
        new = minimize_movement(old, new, request.ranks, num_nodes=request.nodes if decision.nodes_kept else 1)
    ranks_per_node = request.ranks // request.nodes
    job = RebalanceTask(
        weights=source,
        truth=truth,
        layers=layers,
        layer_names=tuple(source.layer_ids[i] for i in layers) if isinstance(source, Checkpoint) else layers,
        loads=loads,
        old=old,
        new=new,
        num_ranks=request.ranks,
        node_of_rank=tuple(rank // ranks_per_node for rank in range(request.ranks)),
        expert_bytes=expert_bytes,
        worth=should_rebalance(old, new, loads, request.ranks, np.array(expert_bytes), _cost_model(request)),
        backend=_check_backend(request.backend, request.device, background=request.pace is not None),
        window_bytes=None if request.window is None else parse_size("--window", request.window),
        timeout_s=request.timeout_s,
        bytes_per_s=None if request.pace is None else parse_pace(request.pace),
        verify=_parse_verify(request.verify),
        policy=selected.text,
        plans=decision.plans,
        notes=(*recorded.notes, *decision.notes, *_doubts(old, new, loads, request.ranks)),
        device=request.device,
    )
    if job.window_bytes is not None:
        # A window that is too small for one expert is found here, not by the ranks.
        schedule_steps(job.plan(), job.expert_bytes, window_bytes=job.window_bytes)
    return job


def _check_device(device: str) -> None:
    """Raise `InputError` if the device cannot hold the weights."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device", remedy="omit --device, or give --device cpu")


def _policy_text(request: RebalanceRequest) -> str:
    if request.policy is not None:
        return request.policy
    return "deepseek" if request.placement is None else "incremental"


def _cost_model(request: RebalanceRequest) -> CostModel:
    if request.cost is None:
        return CostModel()
    if not request.if_worth_it:
        raise InputError("--cost needs --if-worth-it", remedy="give both, or omit --cost")
    try:
        resolved = resolve_options(parse_config(f"cost?{request.cost}"), CostModel, kind="setting", environment={})
    except ConfigError as error:
        raise InputError(f"--cost: {error.what}", why=error.why, remedy=error.remedy) from error
    model: CostModel = resolved.values
    return model


def _doubts(old: NDArray[np.int64], new: NDArray[np.int64], loads: NDArray[np.float64], num_ranks: int) -> list[str]:
    """Return a note if moving gains nothing."""
    if np.array_equal(old, new):
        return ["the placement stays as it is: nothing moves"]
    if imbalance(new, loads, num_ranks).mean() >= imbalance(old, loads, num_ranks).mean() - _GAINS_NOTHING:
        return ["the new placement is not better balanced than the old one, so moving gains nothing"]
    return []


def _check_backend(backend: str | None, device: str, *, background: bool) -> str:
    """Return the config string to use. Raises `ConfigError` or `BackendError` if its backend cannot be selected."""
    text = backend_from_environment(backend) or AUTO
    entry = default_registry().resolve(text).entry
    if entry is not None:
        types = (device,) if entry.spec is None else entry.spec.capabilities.device_types
        if device not in types:
            raise BackendUnavailableError(
                f"backend {entry.name!r} does not move weights on {device}",
                name=entry.name,
                remedy=f"give --device {types[0]}, or another backend: 'eplb backends' lists what each can do",
            )
        if background and entry.spec is not None and not entry.spec.capabilities.background:
            raise BackendUnavailableError(
                f"backend {entry.name!r} cannot run beside inference, but --pace asks for a background job",
                name=entry.name,
                remedy="omit --pace, or give a backend that can: see 'eplb backends --json -'",
            )
    return text


def _parse_verify(text: str) -> Thoroughness:
    if text not in THOROUGHNESS:
        raise InputError(f"--verify cannot be {text!r}", remedy=f"give one of {', '.join(THOROUGHNESS)}")
    return cast("Thoroughness", text)


def _check_counts(request: RebalanceRequest) -> None:
    for option in ("ranks", "nodes", "groups"):
        value = getattr(request, option)
        if value is not None and value < 1:
            raise InputError(f"--{option} is {value}", why="it must be 1 or more")
    if request.redundant is not None and request.redundant < 0:
        raise InputError(f"--redundant is {request.redundant}", why="it must be 0 or more")
    if request.seed < 0:
        raise InputError(f"--seed is {request.seed}", why="it must be 0 or more")
    if not request.timeout_s > 0:
        raise InputError(f"--timeout is {request.timeout_s:g}", why="it must be above 0 seconds")
    if request.ranks % request.nodes:
        raise InputError(f"{request.ranks} ranks cannot be shared evenly by {request.nodes} nodes")
    if (request.checkpoint is None) == (request.model is None):
        given = "neither" if request.model is None else "both"
        raise InputError(
            f"{given} of --checkpoint and --model {'were' if given == 'both' else 'was'} given",
            remedy="give one: --checkpoint DIR for real weights, --model NAME for random ones of that model's shapes",
        )
    if request.checkpoint is None and request.part is not None:
        raise InputError("--part needs --checkpoint", why="random weights have no parts")
    if request.checkpoint is None and request.verify_against is not None:
        raise InputError("--verify-against needs --checkpoint", why="random weights are generated again to verify them")


def _load_options(
    request: RebalanceRequest, checkpoint: Checkpoint | None, placement: NDArray[np.int64] | None
) -> LoadOptions:
    if request.counts not in get_args(Counts):
        raise InputError(f"--counts cannot be {request.counts!r}", remedy=f"give {' or '.join(get_args(Counts))}")
    model = ModelHints()
    if checkpoint is not None:
        model = ModelHints(
            num_experts=checkpoint.num_experts,
            num_layers=checkpoint.num_hidden_layers,
            num_moe_layers=checkpoint.num_layers,
            experts_per_token=checkpoint.experts_per_token,
        )
    return LoadOptions(
        counts=cast("Counts", request.counts),
        placement=placement,
        window_steps=request.window_steps,
        decay=request.decay,
        model=model,
    )


def _match_weights(
    request: RebalanceRequest,
    checkpoint: Checkpoint | None,
    recorded: RecordedLoads,
    placement: NDArray[np.int64] | None,
) -> tuple[Checkpoint | RandomExperts, RecordedLoads]:
    """Return the weights and the loads of their layers, with notes on what was omitted."""
    loads = recorded.loads
    if checkpoint is None:
        model, scale = find_model(request.model or ""), parse_scale(request.scale)
        experts = RandomExperts(
            scaled(model.tensors, scale), num_layers=loads.shape[0], num_experts=loads.shape[1], seed=request.seed
        )
        return experts, recorded
    if parse_scale(request.scale) != Fraction(1):
        raise InputError("--scale needs --model", why="a checkpoint's tensors have fixed sizes")
    recorded = _without_dense_layers(recorded, checkpoint)
    loads = recorded.loads
    for what, ours, theirs in (
        ("MoE layers", checkpoint.num_layers, loads.shape[0]),
        ("experts", checkpoint.num_experts, loads.shape[1]),
    ):
        if ours == theirs:
            continue
        as_many_slots = what == "experts" and placement is not None and theirs == placement.shape[1]
        raise InputError(
            f"the loads have {_count(theirs, what.removeprefix('MoE '))}, the checkpoint has {_count(ours, what)}",
            where=f"{request.loads}, {request.checkpoint}",
            why="they have as many columns as the placement has slots" if as_many_slots else None,
            remedy="give --counts physical if they count slots"
            if as_many_slots
            else "give loads recorded with this model",
        )
    return checkpoint, replace(recorded, notes=(*checkpoint.notes, *recorded.notes))


def _without_dense_layers(recorded: RecordedLoads, checkpoint: Checkpoint) -> RecordedLoads:
    """Omit dense layers: SGLang's recorder writes a row for every layer, and rows of dense layers are zero."""
    loads = recorded.loads
    if loads.shape[0] == checkpoint.num_layers or loads.shape[0] != checkpoint.num_hidden_layers:
        return recorded
    dense = sorted(set(range(loads.shape[0])) - set(checkpoint.layer_ids))
    if loads[dense].any():
        return recorded
    row = "1 row of the loads belongs" if len(dense) == 1 else f"{len(dense)} rows of the loads belong"
    note = f"{row} to dense layers and {'was' if len(dense) == 1 else 'were'} left out"
    layers = list(checkpoint.layer_ids)
    return replace(recorded, loads=loads[layers], window=recorded.window[:, layers], notes=(*recorded.notes, note))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun.removesuffix('s') if number == 1 else noun}"


def _start_placement(
    request: RebalanceRequest,
    placement: NDArray[np.int64] | None,
    num_layers: int,
    layers: tuple[int, ...],
    num_experts: int,
) -> NDArray[np.int64]:
    if placement is None:
        num_slots = num_experts + (request.redundant or 0)
        if request.ranks > num_slots:
            raise InputError(
                f"there are {request.ranks} ranks, but only {num_slots} slots",
                why=f"{num_experts} experts and {request.redundant or 0} redundant ones",
                remedy=f"give --ranks {num_slots} or fewer, or --redundant {request.ranks - num_experts} or more",
            )
        if num_slots % request.ranks:
            missing = -num_slots % request.ranks
            raise InputError(
                f"{num_slots} slots cannot be shared evenly by {request.ranks} ranks",
                why=f"{num_experts} experts and {request.redundant or 0} redundant ones",
                remedy=f"give --redundant {(request.redundant or 0) + missing}",
            )
        return contiguous_placement(len(layers), num_experts, num_slots, request.ranks)
    rows, num_slots = placement.shape
    if rows == num_layers:
        placement = placement[list(layers)]
    elif rows != len(layers):
        raise InputError(f"the placement has {rows} layers, the loads have {num_layers}", where=str(request.placement))
    if request.redundant is not None and num_slots != num_experts + request.redundant:
        raise InputError(
            f"the placement has {num_slots} slots, but {num_experts} experts and {request.redundant} redundant ones "
            f"make {num_experts + request.redundant}",
            where=str(request.placement),
            remedy="omit --redundant: the placement defines the number of slots",
        )
    return check_placement(placement, request.ranks, num_logical=num_experts, name=str(request.placement))
