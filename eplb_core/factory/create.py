"""`create_eplb_communicator`: from a config string to a communicator, the same on every rank or on none."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext, Binding
from eplb_core.contract.option_types import CommonOptions
from eplb_core.control.agreement import agree_on_outcome, not_all_answered
from eplb_core.control.groups import GroupCoordinator, StatelessGroup, is_stateless, open_control_plane
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    BackendBrokenError,
    BackendUnavailableError,
    ControlPlaneError,
    EplbError,
    NotACommunicatorError,
    StatelessGroupError,
)
from eplb_core.factory.auto import AUTO, AutomaticChoice, wanted_by_all
from eplb_core.factory.proposal import Proposal, agree, describe_layout
from eplb_core.hooks.host import PluginHost
from eplb_core.hooks.observed import default_plugins, observed
from eplb_core.registry.config import (
    BackendConfig,
    ResolvedOptions,
    backend_from_environment,
    parse_config,
    resolve_options,
)
from eplb_core.registry.entry import BackendEntry
from eplb_core.registry.known import DEFAULT_BACKEND
from eplb_core.registry.registry import Registry, default_registry, load_factory, load_options_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """A backend with its options, as one rank would build it."""

    entry: BackendEntry
    options: ResolvedOptions


def create_eplb_communicator(
    group_coordinator: GroupCoordinator | StatelessGroup,
    backend: str | None = None,
    expert_weights: Sequence[torch.Tensor] = (),
    *,
    arguments: Mapping[str, object] | None = None,
    registry: Registry | None = None,
    plugins: PluginHost | None = None,
) -> EplbCommunicator:
    """Return a communicator for the ranks of a group. Every rank of the group has to call it.

    Before anything is built, all ranks tell each other what they would build. Whatever differs, or goes wrong on any
    of them, raises on all of them.

    Args:
        group_coordinator: the group: `TorchGroups`, `StatelessGroup`, or an engine's own object with `rank_in_group`,
            `world_size`, `cpu_group`, `device_group` and `device_communicator`.
        backend: a config string such as `nixl?window=256MiB`, or `auto`. None takes `EPLB_BACKEND` from the
            environment, and without it `torch_nccl`.
        expert_weights: the tensors of one layer, first dimension = local slots. Their device is the communicator's;
            without tensors it is the CPU.
        arguments: option values by name; they win over the config string.
        registry: where to look the backend up; the installed ones by default.
        plugins: who is told of transfers and asked what `auto` means; the installed ones by default.

    Raises:
        HandshakeError: the ranks do not agree, only some of them can build it, or some did not come; the same table on
            every rank.
        ConfigError: the config string, an option in it, or one in the environment is wrong on every rank.
        BackendError: no rank can build it; the sub-class says why.
    """
    registry = registry or default_registry()
    plugins = plugins or default_plugins()
    tensors = tuple(expert_weights)
    device = tensors[0].device if tensors else torch.device("cpu")
    config: BackendConfig | None = None
    problem: EplbError | None = None
    timeout_s = start_timeout_s = float(CommonOptions().timeout)
    try:
        config = parse_config(backend_from_environment(backend) or DEFAULT_BACKEND)
        config = _for_group(config, group_coordinator, registry)
        timeout_s, start_timeout_s = _handshake_timeouts(config, arguments, registry)
    except EplbError as error:
        problem = error
    try:
        control = open_control_plane(group_coordinator, start_timeout_s)
    except ControlPlaneError as error:
        raise not_all_answered(error, group_coordinator.world_size) from error
    automatic: AutomaticChoice | None = None
    if wanted_by_all(control, config, problem, timeout_s) and config is not None:
        scope = control.scoped("auto")
        automatic = AutomaticChoice(scope, config, device, group_coordinator, registry, plugins, timeout_s)
    for attempt in itertools.count():
        if automatic is not None:
            config = automatic.choose()
        mine: Selection | None = None
        if config is not None and problem is None:
            try:
                mine = _select(config, arguments, registry)
                _check_fits(mine.entry, device, group_coordinator)
            except EplbError as error:
                problem = error
        selection = _agreed(control, mine, device, tensors, problem, timeout_s)
        context = BackendContext(
            rank=group_coordinator.rank_in_group,
            world_size=group_coordinator.world_size,
            device=device,
            control=control.scoped(f"communicator {attempt}"),  # what an earlier attempt has told is not to be read
            cpu_group=group_coordinator.cpu_group,
            device_group=group_coordinator.device_group,
            device_communicator=group_coordinator.device_communicator,
        )
        try:
            communicator = _build(selection, context, tensors, control)
            break
        except EplbError as error:
            if automatic is None or not automatic.rule_out(selection.entry.name, error):
                raise
    spec = selection.entry.spec
    communicator.bind(
        Binding(
            selection.options.canonical(),
            context,
            plugins,
            timeout_s=float(getattr(selection.options.values, "timeout", CommonOptions().timeout)),
            background=spec is not None and spec.capabilities.background,
        )
    )
    if _is_first_local_rank(context.rank):
        logger.info("initialized, %s (%s)", type(communicator).__name__, selection.options.canonical())
    return observed(communicator, plugins)


def _for_group(config: BackendConfig, group: GroupCoordinator | StatelessGroup, registry: Registry) -> BackendConfig:
    """Return the config of what stands in for the backend in a stateless group, or the same one."""
    if config.name == AUTO or not is_stateless(group):
        return config
    spec = registry.select(config).spec
    if spec is None or spec.capabilities.stateless_groups or not spec.stateless_substitute:
        return config
    if _is_first_local_rank(group.rank_in_group):
        logger.warning(
            "%s needs a process group and this group is stateless: taking %s instead",
            config.name,
            spec.stateless_substitute,
        )
    return replace(config, name=spec.stateless_substitute, distribution=None)


def _handshake_timeouts(
    config: BackendConfig, arguments: Mapping[str, object] | None, registry: Registry
) -> tuple[float, float]:
    """Return the options `timeout` and `start_timeout`, if they can be known before anything is checked, in seconds."""
    default = float(CommonOptions().timeout)
    try:
        options_class = CommonOptions if config.name == AUTO else load_options_class(registry.select(config))
        values = resolve_options(config, options_class, arguments=arguments).values
    except EplbError:
        return default, default  # the error comes again, and is told to the other ranks, once they can be reached
    timeout_s = float(getattr(values, "timeout", default))
    start_s = getattr(values, "start_timeout", None)
    return timeout_s, timeout_s if start_s is None else float(start_s)


def _select(config: BackendConfig, arguments: Mapping[str, object] | None, registry: Registry) -> Selection:
    entry = registry.select(config)
    options = resolve_options(config, load_options_class(entry), arguments=arguments)
    load_factory(entry)  # a factory that cannot be imported here must not surprise the other ranks later
    return Selection(entry, options)


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


def _agreed(
    control: ControlPlane,
    selection: Selection | None,
    device: torch.device,
    tensors: Sequence[torch.Tensor],
    problem: EplbError | None,
    timeout_s: float,
) -> Selection:
    """Return the selection once all ranks have made the same; raises as `agree` does if not, or if there is none."""
    agree(control, _proposal(selection, device, tensors, problem), problem, timeout_s)
    if selection is None:
        raise EplbError("no backend was selected")
    return selection


def _proposal(
    selection: Selection | None, device: torch.device, tensors: Sequence[torch.Tensor], problem: EplbError | None
) -> Proposal:
    text = f"{type(problem).__name__}: {problem}" if problem is not None else ""
    layout = describe_layout(tensors)
    if selection is None:
        return Proposal(problem=text, device=device.type, layout=layout)
    entry, options = selection.entry, selection.options
    api = ".".join(map(str, entry.spec.api_version)) if entry.spec is not None else ""
    return Proposal(
        problem=text,
        backend=entry.name,
        distribution=f"{entry.distribution} {entry.version}",
        plugin_api=api,
        options="&".join(f"{key}={options.text(key)}" for key in sorted(options.types)),
        device=device.type,
        layout=layout,
    )


def _build(
    selection: Selection, context: BackendContext, tensors: Sequence[torch.Tensor], control: ControlPlane
) -> EplbCommunicator:
    """Call the backend's factory on every rank; if it fails on any, close what the others have built and raise."""
    entry = selection.entry
    problem: Exception | None = None
    built: Any = None
    try:
        built = load_factory(entry)(context, selection.options.values, tensors)
        if not isinstance(built, EplbCommunicator):
            problem = NotACommunicatorError(
                f"backend {entry.name!r} returned a {type(built).__name__}, which is not an EplbCommunicator",
                name=entry.name,
                where=f"{entry.distribution} {entry.version}",
                remedy="derive it from eplb_core.EplbCommunicator; report this to the authors of that distribution",
            )
    except EplbError as error:
        problem = error
    except Exception as error:  # noqa: BLE001 - a third party's factory may raise anything, and the others have to know
        problem = BackendBrokenError(
            f"backend {entry.name!r} failed to build a communicator",
            name=entry.name,
            where=f"{entry.distribution} {entry.version}",
            why=f"{type(error).__name__}: {error}",
        )
        problem.__cause__ = error
    try:
        agree_on_outcome(control, f"building the {entry.name} communicator", problem, _build_timeout(selection))
    except BaseException:
        if isinstance(built, EplbCommunicator):
            built.close()
        raise
    if not isinstance(built, EplbCommunicator):
        raise EplbError("nothing was built")
    return built


def _build_timeout(selection: Selection) -> float:
    """A rank whose construction timed out answers that much later than one that failed at once; allow for both."""
    return 2 * float(getattr(selection.options.values, "timeout", CommonOptions().timeout)) + 5.0


def _is_first_local_rank(rank: int) -> bool:
    return int(os.environ.get("LOCAL_RANK", rank)) == 0
