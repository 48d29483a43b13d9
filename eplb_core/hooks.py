"""Hooks: what others may listen to or decide, beside the backends themselves.

A plugin is a module or an object whose methods bear `hookimpl`, registered in the entry-point group `eplb.plugins`:

    from eplb_core.hooks import hookimpl

    @hookimpl
    def eplb_transfer_finished(event):
        metrics.observe(event.backend, event.stats.seconds)

A hook takes any subset of the arguments of its specification, by name. There is no hook per tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pluggy

from eplb_core.communicator import TransferStats
from eplb_core.discovery import Registration, discover
from eplb_core.options import did_you_mean

if TYPE_CHECKING:
    import click

PROJECT_NAME: Final = "eplb"
PLUGIN_GROUP: Final = "eplb.plugins"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)
"""Marks a plugin's function as an implementation of the hook of the same name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferEvent:
    """What all transfer events tell.

    Attributes:
        backend: the backend's name.
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        bytes_sent: payload bytes queued to leave this rank.
        bytes_received: payload bytes queued to reach it.
        messages: tensors queued, both ways.
    """

    backend: str
    rank: int
    world_size: int
    bytes_sent: int
    bytes_received: int
    messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStarted(TransferEvent):
    """`execute()` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFinished(TransferEvent):
    """`execute()` is about to return. `stats` says what it did."""

    stats: TransferStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed(TransferEvent):
    """`execute()` is about to raise `error`."""

    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCandidate:
    """One backend that `auto` may choose.

    Attributes:
        name: the backend's name.
        usable_on_all: whether every rank's probe said yes.
        reasons: for each rank, in rank order, what its probe said.
        device_type: the torch device type of the expert weights.
        priority: what the backend's spec declares; the default policy takes the highest.
    """

    name: str
    usable_on_all: bool
    reasons: tuple[str, ...]
    device_type: str
    priority: int = 0


class HookSpecifications:
    """Every hook there is. Hooks run on the thread that does the work: be quick, and never wait for another rank."""

    @hookspec
    def eplb_transfer_started(self, event: TransferStarted) -> None:
        """A transfer starts on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_transfer_finished(self, event: TransferFinished) -> None:
        """A transfer finished on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_transfer_failed(self, event: TransferFailed) -> None:
        """A transfer failed on this rank. An exception is logged and otherwise ignored."""

    @hookspec(firstresult=True)
    def eplb_choose_backend(self, candidates: tuple[BackendCandidate, ...]) -> str | None:
        """Choose what `auto` means: return the name of a candidate with `usable_on_all`, or None to leave it to others.

        The answer of one rank holds for all. `candidates` are sorted by name.
        """

    @hookspec
    def eplb_cli_commands(self) -> list[click.Command]:
        """Return click commands to add to `eplb`. None of them replaces a built-in one."""
        raise NotImplementedError

    @hookspec
    def eplb_doctor_checks(self) -> list[Callable[[], object]]:
        """Return callables that check this machine."""
        raise NotImplementedError


class PluginHost:
    """Loads plugins one at a time and calls their hooks, so that none of them can harm a transfer or another plugin.

    Attributes:
        failures: one line for each plugin that could not be loaded, and each hook that does not exist.
    """

    def __init__(self, group: str = PLUGIN_GROUP) -> None:
        self.failures: list[str] = []
        self._group = group
        self._loaded = False
        self._manager = _new_manager()
        self._listeners: dict[str, list[tuple[str, Callable[..., Any]]]] = {}
        self._reported: set[tuple[str, str]] = set()

    def load(self) -> PluginHost:
        """Load every installed plugin, once, and return this host. Never raises because of a plugin."""
        if not self._loaded:
            self._loaded = True
            for registration in discover(self._group):
                self._load_one(registration)
        return self

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin that is no installed distribution, such as an engine's own metrics.

        Raises:
            ValueError: the plugin or the name is registered already.
            pluggy.PluginValidationError: a hook takes an argument that its specification does not have.
        """
        misspelt = _check(plugin, name)
        self._manager.register(plugin, name)
        self._listeners.clear()
        if misspelt:
            self.failures.append(f"plugin {name}: {misspelt}")

    @property
    def plugin_names(self) -> list[str]:
        """The names of all plugins that are loaded, sorted."""
        return sorted(name for name, _ in self._manager.list_name_plugin())

    def notify(self, event: TransferStarted | TransferFinished | TransferFailed) -> None:
        """Tell every plugin of a transfer. Never raises; a failing hook is logged once."""
        hook = _HOOK_OF_EVENT[type(event)]
        self._call_each(hook, event=event)

    def choose_backend(self, candidates: Sequence[BackendCandidate]) -> str | None:
        """Return the name that `auto` stands for, or None if no candidate can be used on every rank.

        A plugin that fails, or that names what cannot be used, is logged and overruled by `highest_priority`.
        """
        ordered = tuple(sorted(candidates, key=lambda candidate: candidate.name))
        usable = {candidate.name for candidate in ordered if candidate.usable_on_all}
        try:
            chosen = self._manager.hook.eplb_choose_backend(candidates=ordered)
        except Exception:  # noqa: BLE001 - a plugin's fault is no reason to go without a backend
            _log.exception("a plugin's eplb_choose_backend failed; taking the one with the highest priority")
            return highest_priority(ordered)
        if chosen is None:
            return highest_priority(ordered)
        if chosen not in usable:
            _log.error("a plugin chose backend %r, which is not usable on every rank; overruled", chosen)
            return highest_priority(ordered)
        return str(chosen)

    def cli_commands(self) -> list[click.Command]:
        """Return the commands that plugins add to `eplb`."""
        return self._collect("eplb_cli_commands")

    def doctor_checks(self) -> list[Callable[[], object]]:
        """Return the checks that plugins add to `eplb doctor`."""
        return self._collect("eplb_doctor_checks")

    def _collect(self, hook: str) -> list[Any]:
        """Return the items of the lists that plugins return; what is no list is logged and left out."""
        found: list[Any] = []
        for items in self._call_each(hook):
            if isinstance(items, list | tuple):
                found.extend(items)
            else:
                _log.error("a plugin's %s returned %s instead of a list", hook, type(items).__name__)
        return found

    def _load_one(self, registration: Registration) -> None:
        name = f"{registration.name}@{registration.distribution}"
        if registration.problem:
            self.failures.append(f"plugin {name} {registration.version}: {registration.problem}")
            return
        try:
            self.register(registration.load(), name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one broken plugin never breaks another
            text = " ".join(str(error).split())
            self.failures.append(f"plugin {name} {registration.version}: {type(error).__name__}: {text}")

    def _call_each(self, hook: str, **arguments: object) -> list[Any]:
        """Call one hook of each plugin by itself, so that an exception in one does not keep it from the next."""
        results = []
        for name, call in self._calls(hook):
            try:
                results.extend(call(**arguments))
            except Exception:  # noqa: BLE001 - a plugin's fault must not harm a transfer
                if (name, hook) not in self._reported:
                    self._reported.add((name, hook))
                    _log.exception("%s of plugin %s failed; it is ignored from now on in the log", hook, name)
        return results

    def _calls(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        if hook not in self._listeners:
            plugins = self._manager.list_name_plugin()
            holders = {
                implementation.plugin_name for implementation in getattr(self._manager.hook, hook).get_hookimpls()
            }
            self._listeners[hook] = [
                (name, self._manager.subset_hook_caller(hook, [other for _, other in plugins if other is not plugin]))
                for name, plugin in plugins
                if name in holders
            ]
        return self._listeners[hook]


def highest_priority(candidates: Sequence[BackendCandidate]) -> str | None:
    """The policy behind `auto` where no plugin has another: the highest priority, then the first name."""
    usable = [candidate for candidate in candidates if candidate.usable_on_all]
    return min(usable, key=lambda candidate: (-candidate.priority, candidate.name)).name if usable else None


_HOOK_OF_EVENT: Final[dict[type, str]] = {
    TransferStarted: "eplb_transfer_started",
    TransferFinished: "eplb_transfer_finished",
    TransferFailed: "eplb_transfer_failed",
}


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(HookSpecifications)
    return manager


def _check(plugin: object, name: str) -> str | None:
    """Try a plugin in a manager of its own, which a failure can leave half done; return what is misspelt, if anything.

    Raises:
        pluggy.PluginValidationError: a hook takes an argument that its specification does not have.
    """
    scratch = _new_manager()
    scratch.register(plugin, name)
    try:
        scratch.check_pending()
    except pluggy.PluginValidationError:
        known = [hook for hook in vars(HookSpecifications) if hook.startswith("eplb_")]
        unknown = [caller.name for caller in scratch.get_hookcallers(plugin) or () if not caller.has_spec()]
        return "; ".join(f"there is no hook {hook!r}{did_you_mean(hook, known)}" for hook in unknown)
    return None
