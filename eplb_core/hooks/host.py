"""Hooks: what plugins may observe or decide.

A plugin is a module or an object with functions marked `hookimpl`, registered in the entry-point group `eplb.plugins`:

    from eplb_core.hooks import hookimpl

    @hookimpl
    def eplb_transfer_finished(event):
        metrics.observe(event.backend, event.stats.seconds)

A hook takes any subset of the arguments of its specification, by name. There is no hook per tensor.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pluggy

from eplb_core.hooks.delivery import EVENT_LIMIT, EventDelivery, Listener
from eplb_core.hooks.events import (
    HOOK_OF_EVENT,
    Event,
    RearrangeFailed,
    RearrangeFinished,
    RearrangeStarted,
    StepCommitted,
    TransferFailed,
    TransferFinished,
    TransferStarted,
)
from eplb_core.registry.discovery import Registration, discover
from eplb_core.words import did_you_mean

if TYPE_CHECKING:
    import click

PROJECT_NAME: Final = "eplb"
PLUGIN_GROUP: Final = "eplb.plugins"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)
"""Marks a plugin's function as an implementation of the hook of the same name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCandidate:
    """One backend that `auto` may choose.

    Attributes:
        name: the backend's name.
        usable_on_all: whether every rank's probe succeeded.
        reasons: the probe's reason on each rank, in rank order.
        device_type: the torch device type of the expert weights.
        priority: declared by the backend's spec; the default policy takes the highest.
    """

    name: str
    usable_on_all: bool
    reasons: tuple[str, ...]
    device_type: str
    priority: int = 0


class HookSpecifications:
    """The specifications of all hooks.

    Hooks that receive an event run on one thread of the plugin host, later than the event but in the order of events:
    a slow hook, or one that raises, cannot affect a transfer. The other hooks run on the caller's thread.
    """

    @hookspec
    def eplb_transfer_started(self, event: TransferStarted) -> None:
        """A transfer starts on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_transfer_finished(self, event: TransferFinished) -> None:
        """A transfer finished on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_transfer_failed(self, event: TransferFailed) -> None:
        """A transfer failed on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_rearrange_started(self, event: RearrangeStarted) -> None:
        """A rearrangement starts on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_step_committed(self, event: StepCommitted) -> None:
        """This rank has committed a step of a rearrangement. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_rearrange_finished(self, event: RearrangeFinished) -> None:
        """A rearrangement finished on this rank. An exception is logged and otherwise ignored."""

    @hookspec
    def eplb_rearrange_failed(self, event: RearrangeFailed) -> None:
        """A rearrangement failed on this rank. An exception is logged and otherwise ignored."""

    @hookspec(firstresult=True)
    def eplb_choose_backend(self, candidates: tuple[BackendCandidate, ...]) -> str | None:
        """Choose for `auto`: return the name of a candidate with `usable_on_all`, or None to let other plugins choose.

        The answer of rank 0 applies to all ranks. `candidates` are sorted by name.
        """

    @hookspec
    def eplb_cli_commands(self) -> list[click.Command]:
        """Return click commands to add to `eplb`. They cannot replace built-in ones."""
        raise NotImplementedError

    @hookspec
    def eplb_doctor_checks(self) -> list[Callable[[], object]]:
        """Return checks for `eplb doctor`: callables without arguments.

        A check may return one `eplb_core.doctor.Finding`, several, or None if all is well. One that fails is shown as a
        warning.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledPlugin:
    """A plugin that was found or registered, whether it works or not.

    Attributes:
        name: the name of its entry point, or the name it was registered with.
        distribution: the distribution that it comes from; empty if it was registered manually.
        version: the distribution's version.
        location: the directory of the distribution's metadata.
        entry_point: `module:attribute`.
        hooks: the hooks that it implements, in the order of `HookSpecifications`.
        problem: why it is not used, or which of its hooks do not exist; empty if nothing is wrong.
        loaded: whether its hooks are called.
    """

    name: str
    distribution: str = ""
    version: str = ""
    location: str = ""
    entry_point: str = ""
    hooks: tuple[str, ...] = ()
    problem: str = ""
    loaded: bool = True


class PluginHost:
    """Loads plugins one at a time and calls their hooks, isolated from transfers and from one another.

    Args:
        group: the entry-point group that `load` searches.
        event_limit: the most events that may wait for hooks; further ones are dropped.

    Attributes:
        failures: one line for each plugin that could not be loaded, and each hook that does not exist.
        plugins: every plugin that was found or registered, in that order, including failed ones.
    """

    def __init__(self, group: str = PLUGIN_GROUP, *, event_limit: int = EVENT_LIMIT) -> None:
        self.failures: list[str] = []
        self.plugins: list[InstalledPlugin] = []
        self._group = group
        self._event_limit = event_limit
        self._loaded = False
        self._manager = _new_manager()
        self._listeners: dict[str, list[Listener]] = {}
        self._reported: set[tuple[str, str]] = set()
        self._deliveries: dict[int, EventDelivery] = {}  # by process: a forked child has a separate thread and queue

    def load(self) -> PluginHost:
        """Load every installed plugin, once, and return this host. Never raises because of a plugin."""
        if not self._loaded:
            self._loaded = True
            for registration in discover(self._group):
                self._load_one(registration)
        return self

    def register(self, plugin: object, name: str) -> None:
        """Register a plugin that does not come from an installed distribution, such as an engine's metrics.

        A communicator emits events only if a listener existed when it was made.

        Raises:
            ValueError: the plugin or the name is already registered.
            pluggy.PluginValidationError: a hook takes an argument that its specification does not have.
        """
        hooks, misspelt = self._add(plugin, name)
        self.plugins.append(InstalledPlugin(name=name, hooks=hooks, problem=misspelt))
        if misspelt:
            self.failures.append(f"plugin {name}: {misspelt}")

    @property
    def plugin_names(self) -> list[str]:
        """The names of all plugins that are loaded, sorted."""
        return sorted(name for name, _ in self._manager.list_name_plugin())

    def listens(self, *events: type[Event]) -> bool:
        """Return whether a plugin has a hook for one of these events."""
        return any(self._calls(HOOK_OF_EVENT[event]) for event in events)

    def notify(self, event: Event) -> None:
        """Deliver an event to every plugin, in the order of the calls, on a thread of this host.

        Returns at once and never raises. A hook that raises is logged once. If more than `event_limit` events wait,
        further ones are counted in `events_dropped`, with one warning.
        """
        hook = HOOK_OF_EVENT[type(event)]
        if listeners := self._calls(hook):
            self._delivery().put(hook, event, listeners)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every plugin has received all events so far; return whether that happened in time.

        Called by a hook it returns False at once. At exit, the interpreter waits for hooks in the same way, for up to
        a second.
        """
        delivery = self._deliveries.get(os.getpid())
        return delivery is None or delivery.flush(timeout_s)

    @property
    def events_dropped(self) -> int:
        """Events that were not delivered in this process because too many were waiting."""
        delivery = self._deliveries.get(os.getpid())
        return 0 if delivery is None else delivery.dropped

    def choose_backend(self, candidates: Sequence[BackendCandidate]) -> str | None:
        """Return the backend that `auto` takes, or None if no candidate is usable on every rank.

        If a plugin fails or names an unusable backend, that is logged and `highest_priority` decides.
        """
        ordered = tuple(sorted(candidates, key=lambda candidate: candidate.name))
        usable = {candidate.name for candidate in ordered if candidate.usable_on_all}
        try:
            chosen = self._manager.hook.eplb_choose_backend(candidates=ordered)
        except Exception:  # noqa: BLE001 - a plugin's fault is no reason to go without a backend
            _log.exception("a plugin's eplb_choose_backend failed; taking the backend with the highest priority")
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
        """Return the items of the lists that plugins return; anything else is logged and ignored."""
        found: list[Any] = []
        for items in self._call_each(hook):
            if isinstance(items, list | tuple):
                found.extend(items)
            else:
                _log.error("a plugin's %s returned %s instead of a list", hook, type(items).__name__)
        return found

    def _load_one(self, registration: Registration) -> None:
        name = f"{registration.name}@{registration.distribution}"
        hooks: tuple[str, ...] = ()
        problem, loaded = registration.problem or "", False
        if not problem:
            try:
                hooks, problem = self._add(registration.load(), name)
                loaded = True
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one broken plugin never breaks another
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.plugins.append(
            InstalledPlugin(
                name=registration.name,
                distribution=registration.distribution,
                version=registration.version,
                location=registration.location,
                entry_point=registration.value,
                hooks=hooks,
                problem=problem,
                loaded=loaded,
            )
        )
        if problem:
            self.failures.append(f"plugin {name} {registration.version}: {problem}")

    def _add(self, plugin: object, name: str) -> tuple[tuple[str, ...], str]:
        """Start calling a plugin's hooks; return them, and its misspelt functions."""
        hooks, misspelt = _check(plugin, name)
        self._manager.register(plugin, name)
        self._listeners.clear()
        return hooks, misspelt

    def _delivery(self) -> EventDelivery:
        process = os.getpid()
        delivery = self._deliveries.get(process)
        if delivery is None:
            reported = self._reported  # not this host, which the thread would keep alive

            def call(hook: str, listener: Listener, event: Event) -> None:
                try:
                    listener[1](event=event)
                except BaseException:  # noqa: BLE001 - nothing else on this thread could handle it
                    _report_once(reported, hook, listener[0])

            # setdefault, since two threads may both find none, and a lock could be held during a fork.
            ours = EventDelivery(call, self._event_limit)
            delivery = self._deliveries.setdefault(process, ours)
            if delivery is ours:
                weakref.finalize(self, ours.close).atexit = False
        return delivery

    def _call_each(self, hook: str, **arguments: object) -> list[Any]:
        """Call one hook of each plugin separately, so that an exception in one does not affect the next."""
        results = []
        for name, call in self._calls(hook):
            try:
                results.extend(call(**arguments))
            except Exception:  # noqa: BLE001 - a plugin's fault must not harm who asks
                _report_once(self._reported, hook, name)
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


def hook_summaries() -> dict[str, str]:
    """Return every hook, with one sentence on when it is called."""
    return {
        name: (specification.__doc__ or "").partition(".")[0] + "."
        for name, specification in vars(HookSpecifications).items()
        if name.startswith("eplb_")
    }


def highest_priority(candidates: Sequence[BackendCandidate]) -> str | None:
    """The default policy of `auto`: the highest priority, then the first name."""
    usable = [candidate for candidate in candidates if candidate.usable_on_all]
    return min(usable, key=lambda candidate: (-candidate.priority, candidate.name)).name if usable else None


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(HookSpecifications)
    return manager


def _report_once(reported: set[tuple[str, str]], hook: str, plugin: str) -> None:
    """Log the current exception, unless this hook of this plugin has failed before."""
    if (plugin, hook) not in reported:
        reported.add((plugin, hook))
        _log.exception("%s of plugin %s failed; further failures are not logged", hook, plugin)


def _check(plugin: object, name: str) -> tuple[tuple[str, ...], str]:
    """Try a plugin in a separate manager, because a failure can leave it half registered.

    Returns:
        The hooks that it implements, and a text about misspelt ones, or an empty text.

    Raises:
        pluggy.PluginValidationError: a hook takes an argument that its specification does not have.
    """
    scratch = _new_manager()
    scratch.register(plugin, name)
    known = list(hook_summaries())
    implemented = {caller.name for caller in scratch.get_hookcallers(plugin) or ()}
    try:
        scratch.check_pending()
        unknown = []
    except pluggy.PluginValidationError:
        unknown = [caller.name for caller in scratch.get_hookcallers(plugin) or () if not caller.has_spec()]
    misspelt = "; ".join(f"there is no hook {hook!r}{did_you_mean(hook, known)}" for hook in unknown)
    return tuple(hook for hook in known if hook in implemented), misspelt
