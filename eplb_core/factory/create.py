"""`create_eplb_communicator`: from a config string to a communicator, the same on every rank or on none."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext, Binding
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.staging import default_staging_bytes
from eplb_core.control.agreement import agree_on_outcome, not_all_answered
from eplb_core.control.groups import GroupCoordinator, StatelessGroup, is_stateless, open_control_plane
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    BackendBrokenError,
    BackendUnavailableError,
    ControlPlaneError,
    EplbError,
    InputError,
    NotACommunicatorError,
    StatelessGroupError,
)
from eplb_core.factory.auto import AutomaticChoice, wanted_by_all
from eplb_core.factory.proposal import Proposal, agree, describe_layout
from eplb_core.hooks.host import PluginHost
from eplb_core.hooks.observed import default_plugins, observed
from eplb_core.registry.config import AUTO, BackendConfig, ResolvedOptions, backend_from_environment, parse_config
from eplb_core.registry.entry import BackendEntry
from eplb_core.registry.known import DEFAULT_BACKEND
from eplb_core.registry.registry import Registry, ResolvedBackend, default_registry, load_factory
from eplb_core.words import word_list

logger = logging.getLogger(__name__)


def create_eplb_communicator(
    group_coordinator: GroupCoordinator | StatelessGroup,
    backend: str | None = None,
    expert_weights: Sequence[torch.Tensor] = (),
    *,
    arguments: Mapping[str, object] | None = None,
    registry: Registry | None = None,
    plugins: PluginHost | None = None,
) -> EplbCommunicator:
    """Return a communicator for the ranks of a group. Every rank of the group must call it.

    Before anything is built, all ranks exchange what they would build. Any difference, and any failure on one rank,
    raises on all ranks.

    Args:
        group_coordinator: the group: `TorchGroups`, `StatelessGroup`, or an engine's own object with `rank_in_group`,
            `world_size`, `cpu_group`, `device_group` and `device_communicator`.
        backend: a config string such as `nixl?window=256MiB`, or `auto`. None takes `EPLB_BACKEND` from the
            environment, and without it `torch_nccl`.
        expert_weights: the tensors of one layer, first dimension = local slots. Their device is the communicator's;
            without tensors it is the CPU.
        arguments: option values by name; they win over the config string.
        registry: the backends to select from; the installed ones by default.
        plugins: the plugins that observe transfers and decide for `auto`; the installed ones by default.

    Raises:
        HandshakeError: the ranks do not agree, only some can build it, or some are missing; the same table on every
            rank.
        ConfigError: the config string, an option in it, or one in the environment is wrong on every rank.
        BackendError: no rank can build it; the sub-class says why.
        InputError: an argument is something else, such as the tensors of all layers in place of those of one.
    """
    _check_arguments(group_coordinator, backend, expert_weights)
    registry = registry or default_registry()
    plugins = plugins or default_plugins()
    tensors = tuple(expert_weights)
    device = tensors[0].device if tensors else torch.device("cpu")
    attempt = _attempt(
        backend_from_environment(backend) or DEFAULT_BACKEND, group_coordinator, device, arguments, registry
    )
    try:
        control = open_control_plane(group_coordinator, attempt.start_timeout_s, attempt.timeout_s)
    except ControlPlaneError as error:
        raise not_all_answered(error, group_coordinator.world_size) from error
    automatic: AutomaticChoice | None = None
    if wanted_by_all(control, attempt.config, attempt.problem, attempt.timeout_s) and attempt.config is not None:
        scope = control.scoped("auto")
        automatic = AutomaticChoice(
            scope, attempt.config, device, group_coordinator, registry, plugins, attempt.timeout_s
        )
    for number in itertools.count():
        if automatic is not None:
            attempt = _attempt(automatic.choose(), group_coordinator, device, arguments, registry)
        staging_bytes = agree(control, _proposal(attempt, device, tensors), attempt.problem, attempt.timeout_s)
        context = BackendContext(
            rank=group_coordinator.rank_in_group,
            world_size=group_coordinator.world_size,
            device=device,
            control=control.scoped(f"communicator {number}"),  # keep apart from messages of earlier attempts
            cpu_group=group_coordinator.cpu_group,
            device_group=group_coordinator.device_group,
            device_communicator=group_coordinator.device_communicator,
            staging_bytes=staging_bytes,
        )
        entry, options = attempt.selected()
        try:
            communicator = _build(entry, options, context, tensors, control, attempt.timeout_s)
            break
        except EplbError as error:
            if automatic is None or not automatic.rule_out(entry.name, error):
                raise
    background = entry.spec is not None and entry.spec.capabilities.background
    config = options.canonical()
    communicator.bind(Binding(config, context, plugins, timeout_s=attempt.timeout_s, background=background))
    if _is_first_local_rank(context.rank):
        logger.info("initialized, %s (%s)", type(communicator).__name__, config)
    return observed(communicator, plugins)


def _check_arguments(group: object, backend: object, expert_weights: object) -> None:
    """Raise `InputError` for what a first program mixes up. The types say it too, but few programs are checked."""
    missing = [name for name in ("rank_in_group", "world_size", "cpu_group") if not hasattr(group, name)]
    if missing:
        raise InputError(
            f"the group of ranks is {_described(group)}",
            why=f"it has no {word_list(missing, 'and')}",
            remedy="give TorchGroups(), a StatelessGroup, or the engine's own group coordinator",
        )
    if backend is not None and not isinstance(backend, str):
        raise InputError(f"the backend is {_described(backend)}", remedy="give a config string such as 'auto', or None")
    first = expert_weights[0] if isinstance(expert_weights, list | tuple) and expert_weights else None
    if isinstance(first, list | tuple):
        raise InputError(
            f"the expert weights are {_described(expert_weights)} of {_described(first)}",
            why="the communicator takes the tensors of one layer, the Rearranger those of all layers",
            remedy="give weights[0]",
        )
    others = [each for each in cast("Iterable[object]", expert_weights) if not isinstance(each, torch.Tensor)]
    if others:
        raise InputError(
            f"one of the expert weights is {_described(others[0])}",
            remedy="give torch tensors; torch.from_numpy makes them of arrays",
        )


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What one rank would build, or why it cannot.

    Attributes:
        config: the request, resolved for this group; None if it cannot be resolved.
        backend: the selected backend; None if it cannot be selected, or for `auto`.
        problem: why this rank cannot build it, or None.
        timeout_s: the `timeout` option if known, else its default, in seconds.
        start_timeout_s: the `start_timeout` option, likewise.
    """

    config: BackendConfig | None
    backend: ResolvedBackend | None
    problem: EplbError | None
    timeout_s: float
    start_timeout_s: float

    def selected(self) -> tuple[BackendEntry, ResolvedOptions]:
        """Return the backend to build. Raises the problem, if there is one."""
        if self.problem is not None or self.backend is None or self.backend.entry is None:
            raise self.problem or EplbError("no backend was selected")
        return self.backend.entry, self.backend.options


def _attempt(
    asked: BackendConfig | str,
    group: GroupCoordinator | StatelessGroup,
    device: torch.device,
    arguments: Mapping[str, object] | None,
    registry: Registry,
) -> _Attempt:
    """Select a backend on this rank alone. Errors are not raised: the other ranks must be informed first."""
    config: BackendConfig | None = None
    backend: ResolvedBackend | None = None
    problem: EplbError | None = None
    timeout_s = start_timeout_s = float(CommonOptions().timeout)
    try:
        config = _for_group(parse_config(asked) if isinstance(asked, str) else asked, group, registry)
        resolved = registry.resolve(config, arguments=arguments)
        timeout_s, start_timeout_s = resolved.timeout_s, resolved.start_timeout_s
        if resolved.entry is not None:
            load_factory(resolved.entry)  # an import error must not surprise the other ranks later
            backend = resolved
            _check_fits(resolved.entry, device, group)
    except EplbError as error:
        # The options of auto belong to the backend that it will choose: they are checked then.
        problem = None if config is not None and config.name == AUTO else error
    return _Attempt(config, backend, problem, timeout_s, start_timeout_s)


def _for_group(config: BackendConfig, group: GroupCoordinator | StatelessGroup, registry: Registry) -> BackendConfig:
    """Return the config of the backend's substitute in a stateless group, or the same config."""
    if config.name == AUTO or not is_stateless(group):
        return config
    spec = registry.select(config).spec
    if spec is None or spec.capabilities.stateless_groups or not spec.stateless_substitute:
        return config
    if _is_first_local_rank(group.rank_in_group):
        logger.warning(
            "%s needs a process group, but this group is stateless: using %s instead",
            config.name,
            spec.stateless_substitute,
        )
    return replace(config, name=spec.stateless_substitute, distribution=None)


def _check_fits(entry: BackendEntry, device: torch.device, group: GroupCoordinator | StatelessGroup) -> None:
    if entry.spec is None:
        return
    stateless = is_stateless(group)
    reason = entry.spec.capabilities.unfit(
        device.type, stateless=stateless, has_device_group=group.device_group is not None
    )
    if reason:
        refused = stateless and not entry.spec.capabilities.stateless_groups
        raise (StatelessGroupError if refused else BackendUnavailableError)(
            f"backend {entry.name!r} cannot be used here",
            name=entry.name,
            why=reason,
            remedy="choose another one; 'eplb backends' lists what each can do",
        )


def _proposal(attempt: _Attempt, device: torch.device, tensors: Sequence[torch.Tensor]) -> Proposal:
    problem, layout = attempt.problem, describe_layout(tensors)
    text = f"{type(problem).__name__}: {problem}" if problem is not None else ""
    if attempt.backend is None or attempt.backend.entry is None:
        return Proposal(problem=text, device=device.type, layout=layout)
    entry, options = attempt.backend.entry, attempt.backend.options
    api = ".".join(map(str, entry.spec.api_version)) if entry.spec is not None else ""
    return Proposal(
        problem=text,
        backend=entry.name,
        distribution=f"{entry.distribution} {entry.version}",
        plugin_api=api,
        options="&".join(f"{key}={options.text(key)}" for key in sorted(options.types)),
        device=device.type,
        layout=layout,
        staging=default_staging_bytes(device),
    )


@torch.inference_mode(False)  # what is made under inference mode, nobody can write to outside
def _build(
    entry: BackendEntry,
    options: ResolvedOptions,
    context: BackendContext,
    tensors: Sequence[torch.Tensor],
    control: ControlPlane,
    timeout_s: float,
) -> EplbCommunicator:
    """Call the backend's factory on every rank; if one fails, close what the others have built and raise."""
    problem: Exception | None = None
    built: Any = None
    try:
        built = load_factory(entry)(context, options.values, tensors)
        if not isinstance(built, EplbCommunicator):
            problem = NotACommunicatorError(
                f"backend {entry.name!r} returned a {type(built).__name__}, which is not an EplbCommunicator",
                name=entry.name,
                where=f"{entry.distribution} {entry.version}",
                remedy="derive it from eplb_core.EplbCommunicator; report this to the authors of that distribution",
            )
    except EplbError as error:
        problem = error
    except Exception as error:  # noqa: BLE001 - a third party's factory may raise anything, and the others must know
        problem = BackendBrokenError(
            f"backend {entry.name!r} failed to build a communicator",
            name=entry.name,
            where=f"{entry.distribution} {entry.version}",
            why=f"{type(error).__name__}: {error}",
        )
        problem.__cause__ = error
    try:
        # A rank whose construction timed out answers later, by that timeout, than one that failed at once.
        agree_on_outcome(control, f"building the {entry.name} communicator", problem, 2 * timeout_s + 5.0)
    except BaseException:
        if isinstance(built, EplbCommunicator):
            built.close()
        raise
    if not isinstance(built, EplbCommunicator):
        raise EplbError("nothing was built")
    return built


def _is_first_local_rank(rank: int) -> bool:
    return int(os.environ.get("LOCAL_RANK", rank)) == 0
