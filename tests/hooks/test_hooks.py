"""Hooks: whoever listens hears, and whoever fails harms nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pluggy
import pytest

from eplb_core.contract.stats import TransferStats
from eplb_core.hooks import (
    BackendCandidate,
    PluginHost,
    TransferFailed,
    TransferFinished,
    TransferStarted,
    hookimpl,
)
from eplb_core.hooks.events import Event
from tests.support.fake_distributions import install, run_python

_TRAFFIC = {"backend": "rail", "rank": 1, "world_size": 4, "bytes_sent": 10, "bytes_received": 20, "messages": 3}
FLUSH_S = 20.0
_NO_GROUP = "eplb.plugins.of-nobody"


def host(**plugins: object) -> PluginHost:
    made = PluginHost(_NO_GROUP).load()
    for name, plugin in plugins.items():
        made.register(plugin, name)
    return made


def notify(made: PluginHost, *events: Event) -> None:
    """Tell of events, and wait until the hooks have heard of them."""
    for event in events:
        made.notify(event)
    assert made.flush(FLUSH_S)


class Listener:
    def __init__(self) -> None:
        self.heard: list[object] = []

    @hookimpl
    def eplb_transfer_started(self, event: object) -> None:
        self.heard.append(event)

    @hookimpl
    def eplb_transfer_finished(self, event: object) -> None:
        self.heard.append(event)

    @hookimpl
    def eplb_transfer_failed(self, event: object) -> None:
        self.heard.append(event)


class Faulty:
    @hookimpl
    def eplb_transfer_started(self, event: object) -> None:
        raise RuntimeError("metrics server is gone")

    @hookimpl
    def eplb_choose_backend(self) -> str:
        raise RuntimeError("no idea")

    @hookimpl
    def eplb_cli_commands(self) -> list[object]:
        raise RuntimeError("no commands")


def chooser(choose: Callable[..., object]) -> object:
    class Chooser:
        @hookimpl
        def eplb_choose_backend(self, candidates: tuple[BackendCandidate, ...]) -> object:
            return choose(candidates)

    return Chooser()


def candidate(name: str, *, usable: bool = True, priority: int = 0) -> BackendCandidate:
    return BackendCandidate(
        name=name, usable_on_all=usable, reasons=("tried", "tried"), device_type="cpu", priority=priority
    )


# --- transfers -------------------------------------------------------------------------------------------------------


def test_every_event_reaches_the_hook_of_its_name():
    listener = Listener()
    events = [
        TransferStarted(**_TRAFFIC),
        TransferFinished(**_TRAFFIC, stats=TransferStats(seconds=0.5)),
        TransferFailed(**_TRAFFIC, error=TimeoutError("rank 2")),
    ]
    notify(host(listener=listener), *events)
    assert listener.heard == events


def test_a_failing_listener_does_not_keep_the_event_from_the_others_or_harm_the_transfer():
    before, after = Listener(), Listener()
    notify(host(before=before, faulty=Faulty(), after=after), TransferStarted(**_TRAFFIC))
    assert len(before.heard) == len(after.heard) == 1


def test_a_failing_listener_is_logged_once(caplog: pytest.LogCaptureFixture):
    with_faulty = host(faulty=Faulty())
    with caplog.at_level(logging.ERROR):
        notify(with_faulty, *[TransferStarted(**_TRAFFIC)] * 3)
    assert [record.getMessage() for record in caplog.records] == [
        "eplb_transfer_started of plugin faulty failed; further failures are not logged"
    ]


def test_a_listener_that_comes_later_hears_what_comes_later():
    first, second = Listener(), Listener()
    growing = host(first=first)
    notify(growing, TransferStarted(**_TRAFFIC))
    growing.register(second, "second")
    notify(growing, TransferStarted(**_TRAFFIC))
    assert (len(first.heard), len(second.heard)) == (2, 1)


def test_a_faulty_listener_that_comes_later_does_not_keep_events_from_those_before():
    listener = Listener()
    growing = host(listener=listener)
    notify(growing, TransferStarted(**_TRAFFIC))
    growing.register(Faulty(), "faulty")
    notify(growing, TransferStarted(**_TRAFFIC))
    assert len(listener.heard) == 2


# --- what auto means -------------------------------------------------------------------------------------------------


def test_without_plugins_auto_is_the_usable_backend_with_the_highest_priority():
    candidates = [candidate("a"), candidate("b", priority=5), candidate("c", usable=False, priority=9)]
    assert host().choose_backend(candidates) == "b"


def test_of_equal_priorities_auto_takes_the_first_name_whatever_the_order_of_the_candidates():
    candidates = [candidate("b"), candidate("a"), candidate("c")]
    assert host().choose_backend(candidates) == host().choose_backend(candidates[::-1]) == "a"


def test_auto_is_nothing_where_nothing_works_everywhere():
    assert host().choose_backend([candidate("a", usable=False)]) is None


def test_a_plugin_decides_what_auto_means():
    policy = chooser(lambda candidates: candidates[-1].name)
    assert host(policy=policy).choose_backend([candidate("b", priority=5), candidate("c")]) == "c"


def test_a_plugin_that_answers_none_leaves_the_choice_to_the_priority():
    assert (
        host(policy=chooser(lambda candidates: None)).choose_backend([candidate("a"), candidate("b", priority=1)])
        == "b"
    )


@pytest.mark.parametrize("answer", ["nonsense", "broken", 7])
def test_a_plugin_that_names_what_cannot_be_used_is_overruled(answer: object, caplog: pytest.LogCaptureFixture):
    candidates = [candidate("a"), candidate("broken", usable=False)]
    assert host(policy=chooser(lambda candidates: answer)).choose_backend(candidates) == "a"
    assert f"a plugin chose backend {answer!r}" in caplog.text


def test_a_plugin_that_fails_to_choose_is_overruled(caplog: pytest.LogCaptureFixture):
    assert host(faulty=Faulty()).choose_backend([candidate("a")]) == "a"
    assert "no idea" in caplog.text


# --- commands and checks ---------------------------------------------------------------------------------------------


def test_commands_and_checks_of_all_plugins_are_collected_around_one_that_fails():
    def check() -> None: ...

    class Extra:
        @hookimpl
        def eplb_cli_commands(self) -> list[object]:
            return ["command"]

        @hookimpl
        def eplb_doctor_checks(self) -> list[Callable[[], None]]:
            return [check]

    collecting = host(extra=Extra(), faulty=Faulty())
    assert collecting.cli_commands() == ["command"]
    assert collecting.doctor_checks() == [check]


def test_what_is_not_a_list_is_left_out(caplog: pytest.LogCaptureFixture):
    class Wrong:
        @hookimpl
        def eplb_cli_commands(self) -> str:
            return "command"

    assert host(wrong=Wrong()).cli_commands() == []
    assert "returned str instead of a list" in caplog.text


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_misspelt_hook_is_reported_with_the_nearest_and_the_plugins_other_hooks_still_run():
    class Misspelt(Listener):
        @hookimpl
        def eplb_transfer_finnished(self, event: object) -> None: ...

    plugin = Misspelt()
    made = host(typo=plugin)
    assert made.failures == [
        "plugin typo: there is no hook 'eplb_transfer_finnished', did you mean 'eplb_transfer_finished' or "
        "'eplb_transfer_failed'?"
    ]
    notify(made, TransferStarted(**_TRAFFIC))
    assert len(plugin.heard) == 1


def test_an_optional_hook_of_another_version_is_no_failure():
    class Ahead:
        @hookimpl(optionalhook=True)
        def eplb_of_the_future(self) -> None: ...

    assert host(ahead=Ahead()).failures == []


def test_a_hook_with_an_argument_that_does_not_exist_is_refused_and_leaves_nothing_behind():
    class Wrong(Listener):
        @hookimpl
        def eplb_transfer_failed(self, event: object, colour: str) -> None: ...

    made = host()
    with pytest.raises(pluggy.PluginValidationError, match="colour"):
        made.register(Wrong(), "wrong")
    assert made.plugin_names == []


def test_of_the_installed_plugins_the_broken_ones_are_recorded_and_the_others_run(tmp_path: Path):
    listener = """
        from eplb_core.hooks import hookimpl
        heard = []
        @hookimpl
        def eplb_transfer_started(event):
            heard.append(event.rank)
        """
    wrong = listener.replace("(event)", "(colour)")
    install(tmp_path, "aa", plugins={"first": "listener_a"}, modules={"listener_a": listener})
    install(tmp_path, "bb", plugins={"raises": "raises"}, modules={"raises": "raise OSError('no socket')"})
    install(tmp_path, "cc", plugins={"wrong": "wrong"}, modules={"wrong": wrong})
    install(tmp_path, "zz", plugins={"last": "listener_z"}, modules={"listener_z": listener})
    answer = run_python(
        """
        from eplb_core.hooks import PluginHost, TransferStarted
        host = PluginHost().load().load()
        host.notify(TransferStarted(backend="x", rank=5, world_size=8, bytes_sent=0, bytes_received=0, messages=0))
        assert host.flush(10)
        import listener_a, listener_z
        ours = [name for name in host.plugin_names if "@eplb" not in name]
        answer = [ours, listener_a.heard, listener_z.heard, host.failures]
        """,
        [tmp_path],
    )
    names, first, last, failures = answer
    assert names == ["first@aa", "last@zz"]
    assert first == last == [5]
    assert failures[0] == "plugin raises@bb 1.0: OSError: no socket"
    assert failures[1].startswith("plugin wrong@cc 1.0: PluginValidationError: ")
    assert len(failures) == 2


def test_nothing_is_searched_before_load():
    found = run_python(
        """
        import sys
        from eplb_core.hooks import PluginHost
        host = PluginHost()
        answer = [host.plugin_names, "torch" in sys.modules, "click" in sys.modules]
        """
    )
    assert found == [[], False, False]
