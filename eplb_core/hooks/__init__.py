"""Hooks and events: what plugins import, and how events reach them."""

from eplb_core.hooks.events import RearrangeEvent as RearrangeEvent
from eplb_core.hooks.events import RearrangeFailed as RearrangeFailed
from eplb_core.hooks.events import RearrangeFinished as RearrangeFinished
from eplb_core.hooks.events import RearrangeStarted as RearrangeStarted
from eplb_core.hooks.events import StepCommitted as StepCommitted
from eplb_core.hooks.events import TransferEvent as TransferEvent
from eplb_core.hooks.events import TransferFailed as TransferFailed
from eplb_core.hooks.events import TransferFinished as TransferFinished
from eplb_core.hooks.events import TransferStarted as TransferStarted
from eplb_core.hooks.host import BackendCandidate as BackendCandidate
from eplb_core.hooks.host import HookSpecifications as HookSpecifications
from eplb_core.hooks.host import InstalledPlugin as InstalledPlugin
from eplb_core.hooks.host import PluginHost as PluginHost
from eplb_core.hooks.host import hookimpl as hookimpl
