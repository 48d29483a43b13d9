"""Chooses where each expert that has to cross is read from: who relays it inside a node, and which holder sends it.

Both choices spread the sends evenly over the ranks, in each layer and in all of them together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray

_ROUNDS = 64
"""In how many rounds a layer's choices are made, at most. A choice does not see those of its own round."""


class SendCounts:
    """How many experts each rank sends, as far as it is decided.

    Args:
        num_layers: the number of layers.
        num_ranks: the number of ranks.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._in_layer = np.zeros(num_layers * num_ranks, dtype=np.int64)
        self._total = np.zeros(num_ranks, dtype=np.int64)

    def add(self, layer: IntArray, rank: IntArray, sends: npt.ArrayLike) -> None:
        """Count `sends` more for each layer and rank."""
        np.add.at(self._in_layer, layer * self._num_ranks + rank, sends)
        np.add.at(self._total, rank, sends)

    def cost(self, layer: IntArray, rank: IntArray) -> IntArray:
        """Return what orders ranks by their sends in the layer, then by those in all, in 48 bits."""
        cost: IntArray = (self._in_layer[layer * self._num_ranks + rank] << 28) + self._total[rank]
        return cost


def choose_relays(
    layer: IntArray, dst_rank: IntArray, key: IntArray, from_other_node: npt.NDArray[np.bool_], counts: SendCounts
) -> IntArray:
    """Choose the transfers that bring an expert to a node on behalf of others there.

    Args:
        layer: `[T]`, of each transfer.
        dst_rank: `[T]`, where the expert is needed.
        key: `[T]`, the same for transfers of one expert of one layer to one node.
        from_other_node: `[T]`, whether the node has no copy.
        counts: what the ranks send; relayed sends are added to it.

    Returns:
        `[T]`, the transfer that brings the expert to this one's node, -1 if this one does, or the node has a copy.
    """
    after = np.full(len(key), -1, dtype=np.int64)
    members = np.flatnonzero(from_other_node)
    members = members[np.argsort(key[members], kind="stable")]
    begin = np.flatnonzero(np.diff(key[members], prepend=-1) != 0)
    end = np.append(begin[1:], len(members))
    shared = end - begin > 1
    begin, end = begin[shared], end[shared]
    first = members[begin]
    turn = np.arange(len(begin))
    chosen = members[_choose(begin, end, dst_rank[members], layer[first], turn, end - begin - 1, counts)]
    relayed = members[_ranges(begin, end)]
    after[relayed] = np.repeat(chosen, end - begin)
    after[chosen] = -1
    return after


def choose_holders(
    layer: IntArray,
    dst_rank: IntArray,
    begin: IntArray,
    end: IntArray,
    holder_rank: IntArray,
    nodes: IntArray,
    counts: SendCounts,
) -> IntArray:
    """Choose for each transfer one of the holders `begin` to `end - 1`: on the same node, else any that sends least.

    Args:
        layer: `[T]`, of each transfer.
        dst_rank: `[T]`, where the expert is needed.
        begin: `[T]`, the first of the holders to choose from.
        end: `[T]`, the one behind the last.
        holder_rank: `[H]`, the rank of each holder.
        nodes: `[num_ranks]`, the node of each rank.
        counts: what the ranks send already.

    Returns:
        `[T]`, index into the holders.
    """
    near = (nodes[dst_rank], nodes[holder_rank])
    return _choose(begin, end, holder_rank, layer, layer + dst_rank, np.ones_like(begin), counts, near)


def _choose(
    begin: IntArray,
    end: IntArray,
    option_rank: IntArray,
    layer: IntArray,
    turn: IntArray,
    sends: IntArray,
    counts: SendCounts,
    near: tuple[IntArray, IntArray] | None = None,
) -> IntArray:
    """Choose for each of `N` one of the options `begin` to `end - 1`, so that sends are spread over ranks.

    Those without a choice are counted first. The others choose greedily, those with the fewest options first, all
    layers side by side, a few of each layer at a time: a choice does not see those of the same round, which hardly
    unbalances anything and keeps the number of rounds, and so the time, bounded.

    Args:
        begin: `[N]`.
        end: `[N]`, greater than `begin`.
        option_rank: the rank of each option.
        layer: `[N]`.
        turn: `[N]`, ties go to the option of this number, counted round, so that equals do not all meet at one rank.
        sends: `[N]`, what the chosen rank has to send more.
        counts: what the ranks send already; the choices are added to it.
        near: a node for each of `[N]` and one for each option; if given, options of the same node come first.

    Returns:
        `[N]`, index into the options.
    """
    chosen = begin.copy()
    count = end - begin
    forced = count == 1
    counts.add(layer[forced], option_rank[begin[forced]], sends[forced])
    free = np.flatnonzero(~forced)
    if not len(free):
        return chosen
    free = free[np.lexsort((free, count[free], layer[free]))]
    per_layer = np.bincount(layer[free])
    position = np.arange(len(free)) - np.repeat(np.cumsum(per_layer) - per_layer, per_layer)
    rounds = position // (1 + int(per_layer.max()) // _ROUNDS)
    free = free[np.argsort(rounds, kind="stable")]
    for batch in np.split(free, np.cumsum(np.bincount(rounds))[:-1]):
        number = np.arange(int(count[batch].max()))
        exists = number < count[batch, None]
        options = begin[batch, None] + np.where(exists, number, 0)
        cost = counts.cost(layer[batch, None], option_rank[options])
        if near is not None:
            cost += (near[0][batch, None] != near[1][options]).astype(np.int64) << 48
        cost = (cost << 12) + (number - turn[batch, None]) % count[batch, None]
        best = options[np.arange(len(batch)), np.where(exists, cost, np.iinfo(np.int64).max).argmin(axis=1)]
        chosen[batch] = best
        counts.add(layer[batch], option_rank[best], sends[batch])
    return chosen


def _ranges(begin: IntArray, end: IntArray) -> IntArray:
    """Return the numbers from each `begin` to its `end - 1`, one range after the other."""
    count = end - begin
    numbers: IntArray = np.arange(int(count.sum())) + np.repeat(begin - (np.cumsum(count) - count), count)
    return numbers
