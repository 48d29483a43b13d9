"""The backend `auto`: every rank probes every backend, and all take the best one that works on all ranks."""

from __future__ import annotations

import dataclasses
import logging

import msgspec
import torch

from eplb_core.control.agreement import all_answer, exchange, failed_ranks
from eplb_core.control.groups import GroupCoordinator, StatelessGroup, is_stateless
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import (
    BackendUnavailableError,
    ControlPlaneError,
    EplbError,
    HandshakeError,
    PeerLostError,
    TransferTimeoutError,
)
from eplb_core.hooks.host import BackendCandidate, PluginHost
from eplb_core.registry.config import AUTO, BackendConfig, ConfigOption
from eplb_core.registry.entry import BackendEntry, BackendState
from eplb_core.registry.probe import run_probe
from eplb_core.registry.registry import Registry

_PROBE_S = 30.0
_WAITED_IN_VAIN = tuple(kind.__name__ for kind in (TransferTimeoutError, PeerLostError, ControlPlaneError))

logger = logging.getLogger(__name__)


class _Finding(msgspec.Struct, array_like=True, frozen=True):
    """One rank's probe result for one backend."""

    name: str
    available: bool
    reason: str
    priority: int


def wanted_by_all(
    control: ControlPlane, config: BackendConfig | None, problem: EplbError | None, timeout_s: float
) -> bool:
    """Return True if every rank asks for `auto`, which needs extra messages, and False if none does.

    Raises:
        HandshakeError: only some ask for it, or a rank did not answer; the same table on every rank.
    """
    name = "" if config is None else config.name
    why = problem if config is None else None  # with a known name, it is reported later, in the full proposal
    answers = all_answer(control, "the requested backend", timeout_s, value=name.encode(), problem=why)
    names = [answer.value.decode() for answer in answers]
    if AUTO not in names:
        return False
    if set(names) == {AUTO}:
        return True
    table = {"backend": [each or "?" for each in names]}
    if failed_ranks(answers):
        table["cannot build"] = [answer.problem or "-" for answer in answers]
    raise HandshakeError(
        "the ranks do not agree on the communicator", table=table, remedy="make these the same on every rank"
    ) from problem


class AutomaticChoice:
    """The backends that `auto` may choose from.

    Args:
        control: the control plane; every rank makes the same calls.
        config: `auto`, with options that the chosen backend gets.
        device: the device of the tensors.
        group: the group of ranks.
        registry: the installed backends.
        plugins: the plugins whose hooks decide.
        timeout_s: the longest wait for the slowest rank, in seconds.

    Raises:
        HandshakeError: a rank did not answer.
    """

    def __init__(
        self,
        control: ControlPlane,
        config: BackendConfig,
        device: torch.device,
        group: GroupCoordinator | StatelessGroup,
        registry: Registry,
        plugins: PluginHost,
        timeout_s: float,
    ) -> None:
        self._control = control
        self._config = config
        self._device_type = device.type
        self._plugins = plugins
        self._timeout_s = timeout_s
        findings = msgspec.msgpack.encode(mine := [_try(entry, device, group) for entry in registry.entries()])
        said = exchange(control, "what each rank's probes found", findings, timeout_s + _PROBE_S * len(mine))
        try:
            ranks = [msgspec.msgpack.decode(value, type=list[_Finding]) for value in said]
        except UNREADABLE as error:
            raise HandshakeError("a rank's findings cannot be read", table={}, why=str(error)) from error
        self._candidates = _candidates(ranks, device.type)

    def choose(self) -> BackendConfig:
        """Return the config of the backend to take, with the options that `auto` had.

        Rank 0 decides, by the `eplb_choose_backend` hook, on the findings of all ranks; the others follow.

        Raises:
            BackendUnavailableError: no remaining backend works on every rank; the error lists the reasons.
            HandshakeError: a rank did not answer.
        """
        decision = (self._plugins.choose_backend(self._candidates) or "") if self._control.rank == 0 else ""
        chosen = exchange(self._control, "rank 0's choice", decision.encode(), self._timeout_s)[0].decode()
        against = "; ".join(
            f"{candidate.name}: {' / '.join(sorted(set(candidate.reasons)))}"
            for candidate in self._candidates
            if candidate.name != chosen
        )
        found = next((each for each in self._candidates if each.name == chosen and each.usable_on_all), None)
        if found is None:
            raise BackendUnavailableError(
                "no backend works on every rank",
                name=AUTO,
                why=against or "none is installed",
                remedy="see 'eplb backends --probe'",
            )
        if self._control.rank == 0:
            reason, where = found.reasons[0], self._device_type
            logger.info("auto chose %s (%s) for %s; against the others: %s", chosen, reason, where, against or "-")
        options = tuple(ConfigOption(option.key, option.value) for option in self._config.options)
        return dataclasses.replace(self._config, name=chosen, options=options)

    def rule_out(self, name: str, error: EplbError) -> bool:
        """Remove a backend that the ranks failed to build; return whether another one may be tried.

        A probe tests a single process. Whether the ranks can reach one another, such as each other's GPUs, is known
        only once they have tried. If the ranks only waited in vain, one of them is dead: then nothing else is tried.
        """
        told = error.table.get("problem", []) if isinstance(error, HandshakeError) else [type(error).__name__]
        if all(each.startswith(_WAITED_IN_VAIN) for each in told if each != "-"):
            return False
        why = f"the ranks could not build it: {error}"
        self._candidates = tuple(
            dataclasses.replace(each, usable_on_all=False, reasons=(why,)) if each.name == name else each
            for each in self._candidates
        )
        if self._control.rank == 0:
            logger.warning("auto cannot take %s: %s", name, error)
        return True


def _try(entry: BackendEntry, device: torch.device, group: GroupCoordinator | StatelessGroup) -> _Finding:
    priority = entry.spec.priority if entry.spec is not None else 0
    if entry.state is not BackendState.READY:
        return _Finding(entry.name, False, f"{entry.state}: {entry.why}", priority)
    if entry.spec is None:
        return _Finding(entry.name, False, entry.why, priority)
    reason = entry.spec.capabilities.unfit(
        device.type, stateless=is_stateless(group), has_device_group=group.device_group is not None
    )
    if reason:
        return _Finding(entry.name, False, reason, priority)
    result = run_probe(entry, device, timeout_s=_PROBE_S)
    return _Finding(entry.name, result.available, result.reason, priority)


def _candidates(ranks: list[list[_Finding]], device_type: str) -> tuple[BackendCandidate, ...]:
    """Merge the ranks' findings; a backend missing on one rank is not usable on all."""
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
