"""What is hooked into SGLang, what the hooks do, and how they are shown to be live.

SGLang only logs a hook that it could not put in place, and serves on without it. So whichever of ours runs first
calls through the others before it lets SGLang start.
"""

from __future__ import annotations

import logging
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from eplb_core.errors import EplbError
from eplb_sglang import choice, engine, locations, policy, signatures
from eplb_sglang.mover import ExpertMover, RearrangementFailedError
from eplb_sglang.survivors import EMPTY, Placement

log = logging.getLogger("eplb_sglang")

PROBE: Final[Any] = type("Probe", (), {"__repr__": lambda _: "a probe of eplb-sglang"})()
"""Handed through SGLang's functions in the place of weights and loads: a hook that is live hands it back."""


class Hooks:
    """The hooks of one process, and what they share.

    Args:
        asked: what the environment asks for.
    """

    def __init__(self, asked: choice.Choice) -> None:
        self.asked = asked
        self.mover: ExpertMover | None = None
        self._empty: npt.NDArray[np.bool_] | None = None

    def table(self) -> list[tuple[str, Callable[..., Any], str]]:
        """Return dotted path, hook, and kind of hook, for each."""
        found: list[tuple[str, Callable[..., Any], str]] = [(signatures.START, self.before_start, "BEFORE")]
        if self.asked.backend is not None:
            found += [
                (signatures.LOADED, self.after_loading, "AFTER"),
                (signatures.SLEEP, self.before_sleep, "BEFORE"),
                (signatures.MOVE, self.move, "REPLACE"),
            ]
        if self.asked.policy is not None:
            found.append((signatures.REBALANCE, self.rebalance, "AROUND"))
        return found

    # --- at the start -----------------------------------------------------------------------------------------------

    def before_start(self, *_: Any, **__: Any) -> None:
        """Refuse typos and hooks that are not in place, before the weights are loaded.

        Raises:
            EplbError: what the environment asks for cannot be had.
            RuntimeError: SGLang has not put a hook in place.
        """
        found = choice.problem(self.asked)
        if found is not None:
            variable, error = found
            error.add_note(f"from environment variable {variable}")
            log.error("%s (from environment variable %s)", error, variable)
            raise error
        dead = [path for path, hook, _ in self.table() if not is_live(path, hook)]
        if dead:
            raise RuntimeError(
                f"eplb-sglang was asked for {self._asked()}, and SGLang has not put its hooks in place on "
                f"{', '.join(dead)}: see 'Failed to apply hooks' further up in this log, or another plugin that "
                "replaces the same"
            )

    def after_loading(self, _result: Any, runner: Any, *__: Any, **___: Any) -> None:
        """Make what moves the experts, once their tensors are there, before SGLang measures what memory is free."""
        if getattr(runner, "eplb_manager", None) is None:
            return
        if engine.joins_later() or getattr(runner, "startup_weight_load", None) is not None:
            log.info("eplb will move the experts: %s, made with the first rearrangement", self.asked.backend)
            return
        placement = engine.current_placement()
        if placement is not None:
            self._mover_for(runner.model.routed_experts_weights_of_layer, placement.shape[1])

    def before_sleep(self, _manager: Any, recv_req: Any) -> None:
        """Let go of the weights before their memory is taken from under a transport; the window goes too."""
        tags = getattr(recv_req, "tags", None)
        if not tags or "weights" in tags:
            self.release()

    # --- where experts go -------------------------------------------------------------------------------------------

    def rebalance(
        self,
        original: Callable[..., Any],
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Any:
        """Ask a policy of eplb; where it cannot answer, SGLang's own decides this time."""
        if tokens_per_expert is PROBE:
            return PROBE
        asked = _given(self.asked.policy, choice.POLICY)
        num_ranks = num_physical_experts // num_local_physical_experts
        placement = engine.current_placement()
        try:
            return policy.place(
                asked,
                tokens_per_expert,
                num_slots=num_physical_experts,
                slots_per_rank=num_local_physical_experts,
                num_groups=num_groups,
                num_nodes=num_nodes,
                old=None if placement is None else self._believed(placement),
                alive=engine.alive_ranks(num_ranks),
            )
        except EplbError as error:
            log.warning("policy %s gives no placement, SGLang's own decides this time: %s", asked, error)
            return original(
                tokens_per_expert=tokens_per_expert,
                num_physical_experts=num_physical_experts,
                num_local_physical_experts=num_local_physical_experts,
                num_groups=num_groups,
                num_nodes=num_nodes,
                algorithm=algorithm,
            )

    # --- how they get there -----------------------------------------------------------------------------------------

    def move(
        self,
        routed_experts_weights_of_layer: Any,
        old_expert_location_metadata: Any,
        new_expert_location_metadata: Any,
        update_layer_ids: Sequence[int],
        nnodes: int,
        rank: int,
    ) -> Any:
        """Move the experts of some layers, and return those that SGLang must read from elsewhere.

        Returns:
            Layer -> experts of this rank that no rank that is alive holds.

        Raises:
            EplbError: it failed, and SGLang cannot or is not to serve on.
        """
        if routed_experts_weights_of_layer is PROBE:
            return PROBE
        old = self._believed(engine.placement_of(old_expert_location_metadata))
        new = engine.placement_of(new_expert_location_metadata)
        layers = list(update_layer_ids)
        mover = self._mover_for(routed_experts_weights_of_layer, old.shape[1])
        try:
            moved = mover.move(old, new, layers, verify=engine.checks_bytes())
        except RearrangementFailedError as failure:
            self.release()
            cause = failure.__cause__
            if self.asked.on_failure != "serve" and cause is not None:
                raise cause from None
            self._note(layers, failure.placement)
            locations.hold(
                new_expert_location_metadata,
                layers,
                failure.placement,
                lambda where: engine.dispatch_table(new_expert_location_metadata, where),
            )
            log.error(
                "eplb could not move the experts as planned; SGLang serves on with those that arrived, all ranks with "
                "the same: %s",
                cause,
            )
            return {}
        except BaseException:
            self.release()
            raise
        self._note(layers, new)
        result = moved.result
        if mover.group.first:
            log.log(
                logging.INFO if len(layers) == len(mover.layers) else logging.DEBUG,
                "eplb moved %d experts (%.1f MB) between ranks in %.3f s, %d steps",
                result.moved,
                result.bytes_moved / 1e6,
                result.seconds,
                result.steps,
            )
        return moved.missing

    def release(self) -> None:
        """Close the communicator; the next rearrangement makes a new one."""
        if self.mover is not None:
            self.mover.close()
        self.mover = None

    # --- what they share --------------------------------------------------------------------------------------------

    def _mover_for(self, weights: Mapping[int, Sequence[torch.Tensor]], num_slots: int) -> ExpertMover:
        """Return what moves these tensors between the ranks that are alive, made anew where either has changed."""
        weights = dict(weights.items())  # SGLang's models hand out an object that only behaves like one
        slots_per_rank = next(iter(weights.values()))[0].shape[0]
        num_ranks = num_slots // slots_per_rank
        if self.mover is not None and self.mover.fits(weights, engine.alive_ranks(num_ranks)):
            return self.mover
        self.release()
        backend = _given(self.asked.backend, choice.BACKEND)
        began = time.perf_counter()
        group = engine.group(num_ranks)
        self.mover = mover = ExpertMover(backend, weights, group)
        if group.first:
            log.info(
                "eplb moves the experts: %s (from environment variable %s), %d ranks, %d layers of %d slots, "
                "%.1f MB a rank, window %.1f MB; hooks of SGLang %s are live; made in %.2f s",
                mover.config,
                choice.BACKEND,
                len(group.alive),
                len(mover.layers),
                mover.slots_per_rank,
                mover.nbytes / 1e6,
                mover.window_bytes / 1e6,
                signatures.engine_version(),
                time.perf_counter() - began,
            )
        return mover

    def _believed(self, placement: Placement) -> Placement:
        """Return SGLang's placement with -1 where a failure has left a slot empty, for which SGLang has no mark."""
        if self._empty is not None and self._empty.shape == placement.shape:
            placement[self._empty] = EMPTY
        return placement

    def _note(self, layers: Sequence[int], placement: Placement) -> None:
        if self._empty is None or self._empty.shape != placement.shape:
            self._empty = np.zeros(placement.shape, np.bool_)
        self._empty[list(layers)] = placement[list(layers)] == EMPTY

    def _asked(self) -> str:
        asked = {choice.BACKEND: self.asked.backend, choice.POLICY: self.asked.policy}
        return " and ".join(f"{variable}={value}" for variable, value in asked.items() if value is not None)


def _given(value: str | None, variable: str) -> str:
    """Return what a variable asks for; the hooks that need it are not registered without it."""
    if value is None:
        raise RuntimeError(f"a hook of eplb-sglang was called that takes {variable}, which is not set")
    return value


def is_live(path: str, hook: Callable[..., Any]) -> bool:
    """Return whether SGLang's function calls this hook: by calling it, where the hook answers a probe."""
    module, _, name = path.rpartition(".")
    if path in _PROBED:
        try:
            answer = getattr(_resolve(module), name)(**dict.fromkeys(_PROBED[path], PROBE))
        except Exception:  # noqa: BLE001 - SGLang's own function does not know what to do with a probe
            return False
        return answer is PROBE
    function = getattr(_resolve(module), name)
    while function is not None:
        if any(cell.cell_contents == hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


_PROBED: Final = {
    signatures.MOVE: signatures.EXPECTED[signatures.UPDATER]["_update_expert_weights_raw"] or (),
    signatures.REBALANCE: signatures.EXPECTED[signatures.ALGORITHMS]["rebalance_experts"] or (),
}


def _resolve(path: str) -> Any:
    return pkgutil.resolve_name(path)
