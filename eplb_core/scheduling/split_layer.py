"""Cuts the moves of one layer into parts that each fit into a few experts' worth of window, sends and receives.

A part reads every slot as it is when the part begins, and overwrites slots at its end. So a slot may be overwritten
once another copy of its expert stays, or arrives in the same part. A rank that still needs the expert elsewhere keeps a
copy of its own, and so does a node: cutting a layer never costs a transfer more than the plan has, in all or between
nodes. Where experts are relayed, a rank waits for one that another rank of its node receives in this part.

What is left when no slot may be overwritten are cycles: every slot waits for the expert that the next one holds.
`eplb_core.scheduling.cycles` turns them.

`cut_in_place` receives into empty slots directly, which takes no window. Then every part ends with giving up the slots
that may be overwritten and were not: they are empty from then on, for a later part to fill. So along a chain of slots
each is emptied by the part that brings its expert elsewhere, and filled by the next; the window is for cycles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eplb_core.errors import EplbError
from eplb_core.scheduling.cycles import turn_cycles
from eplb_core.scheduling.layer import Budget, LayerMoves, LayerTask, Use
from eplb_core.scheduling.layer_state import LayerState

_FRUITLESS = 4
"""In so many layers on end cycles are looked for in vain, since there is little room left, before a step is closed."""

_FEW = 3
"""So many times `cheap_bytes` are staged in one last step rather than moved in place in several."""


def cut_layer(task: LayerTask, budget: Budget) -> LayerMoves:
    """Cut the way of one layer from `old` to `new` into parts.

    After each part, every expert that `new` needs has a copy. What is empty in `new` keeps its expert to the end.

    Args:
        task: what has to happen.
        budget: what a part may use, at least one expert of each that the layer needs.
    """
    state = LayerState(task, [0] * task.places.num_ranks, in_place=False)
    while state.num_pending:
        state.begin_part(budget, Use(task.places.num_ranks))
        state.overwrite()
        if turn_cycles(state):
            state.overwrite()
        if not state.end_part(step=len(state.parts.ends)):
            raise _halted(budget)
    return state.parts


def cut_in_place(
    tasks: Sequence[LayerTask], budget: Budget, cheap_bytes: int, *, turn: int = 0, turns: int = 1
) -> list[LayerMoves]:
    """Cut the ways of some layers into parts that share their steps, and receive into empty slots where they can.

    Args:
        tasks: what has to happen in each layer.
        budget: what all layers together may use in a step, at least one expert of each that they need.
        cheap_bytes: how much may land in the window of a rank in a step though it could go into a slot later.
        turn: the layers may use the window in this step, and every `turns` steps from then on.
        turns: how many groups of layers take turns with the window.

    Returns:
        The parts of every layer, with the steps that they share.
    """
    left = [0] * tasks[0].places.num_ranks
    states = [LayerState(task, left, in_place=True) for task in tasks]
    unfinished = [state for state in states if state.num_pending]
    least = min((state.size for state in unfinished), default=0)
    without_window = replace(budget, window=0)
    step, was_last = 0, False
    while unfinished:
        has_window = step % turns == turn
        now = budget if has_window else without_window
        use = Use(tasks[0].places.num_ranks)
        # A layer in which nothing happened waits for its cycles: there is nothing else to look for in it.
        awake = [state for state in unfinished if not state.waits_for_cycles]
        for state in awake:
            state.begin_part(now, use)
            state.fill_empty()
        if has_window:
            _turn_cycles(unfinished, budget, use, least)
        # What is left is few: better all of it now than a step for each end of a chain.
        is_last = has_window and max(left) <= _FEW * cheap_bytes
        limit = now.window if is_last else min(now.window, cheap_bytes)
        if is_last and not was_last:
            for state in unfinished:
                if state.waits_for_cycles:
                    state.begin_part(budget, use)
        awake = [state for state in unfinished if not state.waits_for_cycles]
        for state in awake:
            state.overwrite(limit)
        for state in awake:
            state.vacate()
        moved = [state.end_part(step) for state in awake]
        if has_window and not any(moved):
            raise _halted(budget)
        unfinished = [state for state in unfinished if state.num_pending]
        step, was_last = step + 1, is_last
    return [state.parts for state in states]


def _turn_cycles(states: Sequence[LayerState], budget: Budget, use: Use, least: int) -> None:
    """Turn cycles in as many of the layers as there is room for, in turn."""
    fruitless, able = 0, len(use.window)
    for state in states:
        if state.moved == [] and state.waits_for_cycles:
            continue
        # A cycle between ranks needs room on two of them.
        if fruitless == _FRUITLESS or able < min(2, len(use.window)):
            return
        if state.waits_for_cycles:
            state.begin_part(budget, use)
            turned = turn_cycles(state)
            state.waits_for_cycles = not turned
        else:
            turned = turn_cycles(state)
        if turned:
            fruitless, able = 0, sum(used + least <= budget.window for used in use.window)
        elif state.moved is None:
            fruitless += 1


def _halted(budget: Budget) -> EplbError:
    return EplbError(
        "the schedule of a layer came to a halt",
        why=f"no slot can be overwritten within {budget}, which is an error in eplb",
        remedy="use a larger window, and report this with both placements",
    )
