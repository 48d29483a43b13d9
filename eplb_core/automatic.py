"""What `auto` means: every rank tries every backend, and all take the best one that works on all of them."""

from __future__ import annotations

import dataclasses
import logging

import msgspec
import torch

from eplb_core.agreement import exchange
from eplb_core.backend_entry import BackendEntry, BackendState
from eplb_core.config import BackendConfig, ConfigOption
from eplb_core.control import ControlPlane
from eplb_core.errors import BackendUnavailableError, EplbError, HandshakeError
from eplb_core.groups import GroupCoordinator, StatelessGroup, is_stateless
from eplb_core.hooks import BackendCandidate, PluginHost
from eplb_core.probing import run_probe
from eplb_core.registry import Registry

AUTO = "auto"

_PROBE_S = 30.0

logger = logging.getLogger(__name__)


class _Finding(msgspec.Struct, array_like=True, frozen=True):
    """What one rank found out about one backend."""

    name: str
    available: bool
    reason: str
    priority: int


def wanted_by_all(
    control: ControlPlane, config: BackendConfig | None, problem: EplbError | None, timeout_s: float
) -> bool:
    """Return whether every rank asks for `auto`, which takes messages of its own; False if none does.

    Raises:
        HandshakeError: some ask for it and others do not, or a rank did not answer; the same table on every rank.
    """
    asked = "!" + str(problem) if config is None or problem is not None else config.name
    said = [value.decode() for value in exchange(control, "which backend is asked for", asked.encode(), timeout_s)]
    if AUTO not in said:
        return False
    if set(said) == {AUTO}:
        return True
    table = {"backend": ["?" if value.startswith("!") else value for value in said]}
    if any(value.startswith("!") for value in said):
        table["cannot build"] = [value[1:] if value.startswith("!") else "-" for value in said]
    raise HandshakeError(
        "the ranks do not agree on the communicator", table=table, remedy="make these the same on every rank"
    ) from problem


def choose(
    control: ControlPlane,
    config: BackendConfig,
    device: torch.device,
    group: GroupCoordinator | StatelessGroup,
    registry: Registry,
    plugins: PluginHost,
    timeout_s: float,
) -> BackendConfig:
    """Return the config of the backend that all ranks take in place of `auto`, with the options that `auto` had.

    Rank 0 decides, by the `eplb_choose_backend` hook, over what every rank found; the others take its word.

    Raises:
        BackendUnavailableError: none works on every rank; it lists the reasons.
        HandshakeError: a rank did not answer.
    """
    findings = [_try(entry, device.type, group) for entry in registry.entries()]
    said = exchange(
        control, "what each rank's probes found", msgspec.msgpack.encode(findings), timeout_s + _PROBE_S * len(findings)
    )
    try:
        ranks = [msgspec.msgpack.decode(value, type=list[_Finding]) for value in said]
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise HandshakeError("a rank's findings cannot be read", table={}, why=str(error)) from error
    candidates = _candidates(ranks, device.type)
    decision = (plugins.choose_backend(candidates) or "") if control.rank == 0 else ""
    chosen = exchange(control, "rank 0's choice", decision.encode(), timeout_s)[0].decode()
    against = "; ".join(
        f"{candidate.name}: {' / '.join(sorted(set(candidate.reasons)))}"
        for candidate in candidates
        if candidate.name != chosen
    )
    if chosen not in {candidate.name for candidate in candidates if candidate.usable_on_all}:
        raise BackendUnavailableError(
            "no backend works on every rank",
            name=AUTO,
            why=against or "none is installed",
            remedy="see 'eplb backends --probe'",
        )
    if control.rank == 0:
        reason = next(candidate.reasons[0] for candidate in candidates if candidate.name == chosen)
        logger.info("auto chose %s (%s) for %s; against the others: %s", chosen, reason, device.type, against or "-")
    options = tuple(ConfigOption(option.key, option.value) for option in config.options)
    return dataclasses.replace(config, name=chosen, options=options)


def _try(entry: BackendEntry, device_type: str, group: GroupCoordinator | StatelessGroup) -> _Finding:
    priority = entry.spec.priority if entry.spec is not None else 0
    if entry.state is not BackendState.READY:
        return _Finding(entry.name, False, f"{entry.state}: {entry.why}", priority)
    if entry.spec is None:
        return _Finding(entry.name, False, entry.why, priority)
    reason = entry.spec.capabilities.unfit(
        device_type, stateless=is_stateless(group), has_device_group=group.device_group is not None
    )
    if reason:
        return _Finding(entry.name, False, reason, priority)
    result = run_probe(entry, device_type, timeout_s=_PROBE_S)
    return _Finding(entry.name, result.available, result.reason, priority)


def _candidates(ranks: list[list[_Finding]], device_type: str) -> tuple[BackendCandidate, ...]:
    """Join the ranks' findings; a backend that some rank does not have is not usable on all."""
    names = sorted({finding.name for rank in ranks for finding in rank})
    candidates = []
    for name in names:
        found = [next((f for f in rank if f.name == name), None) for rank in ranks]
        present = [finding for finding in found if finding is not None]
        candidates.append(
            BackendCandidate(
                name=name,
                usable_on_all=all(finding is not None and finding.available for finding in found),
                reasons=tuple("not installed" if finding is None else finding.reason for finding in found),
                device_type=device_type,
                priority=min(finding.priority for finding in present),
            )
        )
    return tuple(candidates)
