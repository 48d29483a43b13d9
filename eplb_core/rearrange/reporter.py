"""Tells plugins of a rearrangement. Where nobody listens, nothing is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.hooks.events import RearrangeFailed, RearrangeFinished, RearrangeStarted, StepCommitted
from eplb_core.hooks.observed import about_group, plugins_of
from eplb_core.rearrange.result import RearrangeResult
from eplb_core.rearrange.step_runner import StepRunner
from eplb_core.scheduling.schedule import Step


class Reporter:
    """What one rank tells of one rearrangement.

    Args:
        communicator: what moves the bytes; it knows who listens.
        runner: knows what this rank sends and receives.
        steps: all steps.
        num_layers: layers of the placements.
        background: whether it runs beside inference.
    """

    def __init__(
        self,
        communicator: EplbCommunicator,
        runner: StepRunner,
        steps: Sequence[Step],
        num_layers: int,
        *,
        background: bool = False,
    ) -> None:
        host = plugins_of(communicator)
        listens = host.listens(RearrangeStarted, StepCommitted, RearrangeFinished, RearrangeFailed)
        self._host = host if listens else None
        self._about = about_group(communicator)
        self._runner = runner
        self._steps = steps
        self._num_layers = num_layers
        self._background = background
        self._began = time.perf_counter()

    def started(self) -> None:
        """All ranks have the same plan."""
        if self._host is not None:
            self._host.notify(
                RearrangeStarted(
                    **self._about,
                    bytes_to_receive=sum(map(self._runner.incoming_bytes, self._steps)),
                    bytes_to_send=sum(map(self._runner.outgoing_bytes, self._steps)),
                    steps=len(self._steps),
                    layers=self._num_layers,
                    background=self._background,
                )
            )

    def committed(self, number: int, step: Step, seconds: float) -> None:
        """A step is committed on this rank."""
        if self._host is not None:
            self._host.notify(
                StepCommitted(
                    **self._about,
                    step=number,
                    steps=len(self._steps),
                    layers=tuple(step.layers.tolist()),
                    bytes_received=self._runner.incoming_bytes(step),
                    peers=self._runner.peers(step),
                    seconds=seconds,
                )
            )

    def finished(self, result: RearrangeResult) -> None:
        """It ended."""
        if self._host is not None:
            self._host.notify(
                RearrangeFinished(
                    **self._about,
                    seconds=result.seconds,
                    moved=result.moved,
                    bytes_received=int(np.sum([self._runner.incoming_bytes(step) for step in self._steps])),
                    steps=len(self._steps),
                    phases=dict(result.phases),
                    staging_bytes=result.staging_bytes,
                )
            )

    def failed(self, error: BaseException, step: int | None) -> None:
        """It failed in a step."""
        if self._host is not None:
            seconds = time.perf_counter() - self._began
            self._host.notify(RearrangeFailed(**self._about, error=error, seconds=seconds, step=step))
