"""Which sequences share a forward pass: the face of csrc/token_packer.h, and its plain twin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy.typing as npt

from archer_fast import _C
from archer_fast.arguments import MAX_INT32, MAX_INT64, as_int64, as_integer
from archer_fast.packing import Int64


def pack_tokens(lengths: npt.ArrayLike, max_tokens: int, num_ranks: int = 1) -> list[Int64]:
    """Bins of at most `max_tokens` tokens, few of them and equally dear: for each, its items' indices, ascending.

    Five games, at most 8 tokens a pass:

        pack_tokens([5, 2, 3, 4, 2], 8) == [[0, 2], [1, 3, 4]]    # 5 + 3 and 2 + 4 + 2 tokens, cost 34 and 24

    A bin's cost is the sum of its squared lengths, which is what attention spends on it. Longest first, each item goes
    to the cheapest bin that it fits into. There are as few bins as the tokens need wherever the shortest items of each
    bin can be exchanged so that all fit, and never more than first-fit decreasing needs. No item is split, no bin is
    overfull, none is empty; no lengths, no bins.

    With `num_ranks` the number k of bins is a multiple of it, and rank r takes bins r * k / num_ranks up to
    (r + 1) * k / num_ranks, so that the ranks' costs are near one another too. Inside a rank the dearest bin comes
    first: what does not fit into memory fails at once.

    lengths: [n] integers of 1 to max_tokens; max_tokens: 1 to 2**31 - 1. The same lengths give the same bins on every
    machine, in O(n log k).
    Errors: ValueError naming the argument, for a length its index too; also where there are fewer lengths than bins
    (n < num_ranks is always one). TypeError for lengths that are no integers.
    """
    item_ids, cu_bins = _C.pack_tokens(
        as_int64("lengths", lengths),
        as_integer("max_tokens", max_tokens, 1, MAX_INT32),
        as_integer("num_ranks", num_ranks, 1, MAX_INT64),
    )
    return [item_ids[begin:end] for begin, end in itertools.pairwise(cu_bins.tolist())]


def pack_tokens_ref(lengths: Sequence[int], max_tokens: int, num_ranks: int = 1) -> list[list[int]]:
    """The plain twin, and the specification, of `pack_tokens`: the same bins of good arguments in O(n k)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if not order:
        return []
    half = sum(2 * n > max_tokens for n in lengths)
    least = _whole_ranks(max(-(-sum(lengths) // max_tokens), half), num_ranks, len(order))
    bins = _balanced(order, lengths, max_tokens, num_ranks, least)

    # Bins that stayed empty take the longest items that do not lie alone.
    for i in order:
        (home,) = (b for b in bins if i in b)
        if [] in bins and len(home) > 1:
            home.remove(i)
            bins[bins.index([])].append(i)

    def cost(b: list[int]) -> int:
        return sum(lengths[i] ** 2 for i in b)

    dearest_first = sorted((sorted(b) for b in bins), key=lambda b: (-cost(b), b[0]))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for b in dearest_first:
        open_ranks = [rank for rank in ranks if len(rank) < len(bins) // num_ranks]
        min(open_ranks, key=lambda rank: float(sum(map(cost, rank)))).append(b)
    return [b for rank in ranks for b in rank]


def _balanced(order: list[int], lengths: Sequence[int], max_tokens: int, num_ranks: int, least: int) -> list[list[int]]:
    """Bins that hold all items: by cost, or with the shortest of them by parts or by fit, or all by fit."""
    found, bins, num_by_cost = _by_cost_and_parts(order, lengths, max_tokens, least)
    if found is not None:
        return found
    by_fit = _by_fit([[] for _ in order], order, lengths, max_tokens)
    assert by_fit is not None
    wanted = _whole_ranks(sum(b != [] for b in by_fit), num_ranks, len(order))
    if wanted > least:
        found, bins, num_by_cost = _by_cost_and_parts(order, lengths, max_tokens, wanted)
    for share in (2, 8):
        if found is None:
            first = min(num_by_cost, len(order) // share)
            found = _by_fit(_kept(bins, order[:first]), order[first:], lengths, max_tokens)
    return by_fit[:wanted] if found is None else found


def _by_cost_and_parts(
    order: list[int], lengths: Sequence[int], max_tokens: int, num_bins: int
) -> tuple[list[list[int]] | None, list[list[int]], int]:
    """Bins that hold all items, if they do; else the bins by cost, and how many items were not taken out of them."""
    bins, num_by_cost = _by_cost(order, lengths, max_tokens, num_bins)
    found = bins if num_by_cost == len(order) else None
    for again in (5, 14, 28):
        if found is None and again * num_bins < len(order):
            num_by_cost = min(num_by_cost, len(order) - again * num_bins)
            found = _by_parts(_kept(bins, order[:num_by_cost]), order[num_by_cost:], lengths, max_tokens)
    return found, bins, num_by_cost


def _kept(bins: list[list[int]], items: list[int]) -> list[list[int]]:
    return [[i for i in b if i in set(items)] for b in bins]


def _by_cost(order: list[int], lengths: Sequence[int], max_tokens: int, num_bins: int) -> tuple[list[list[int]], int]:
    """Each item in the cheapest bin that it fits into, and the number placed before one fitted nowhere."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room, cost = [max_tokens] * num_bins, [0] * num_bins
    for placed, i in enumerate(order):
        fitting = [b for b in range(num_bins) if room[b] >= lengths[i]]
        if not fitting:
            return bins, placed
        cheapest = min(fitting, key=lambda b: cost[b])
        bins[cheapest].append(i)
        room[cheapest] -= lengths[i]
        cost[cheapest] += lengths[i] ** 2
    return bins, len(order)


def _by_parts(
    bins: list[list[int]], stock: list[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]] | None:
    """Each bin, the fullest first, filled up from the stock (longest first); None where some of it is left.

    First the longest that fits; then, c items of the stock's mean length being what fills the room, the longest of at
    most a c-th of it, or where all are longer of fewer parts.
    """
    stock, full = list(stock), [list(b) for b in bins]
    rooms = [max_tokens - sum(lengths[i] for i in b) for b in bins]
    for b in sorted(range(len(bins)), key=lambda b: rooms[b]):
        room, parts = rooms[b], 1
        while stock and parts > 0:
            found = next((i for i in stock if lengths[i] <= room // parts), None)
            if found is None:
                parts -= 1
                continue
            stock.remove(found)
            full[b].append(found)
            room -= lengths[found]
            num_tokens = sum(lengths[i] for i in stock)
            parts = max(1, (room * len(stock) + num_tokens // 2) // max(num_tokens, 1))
    return None if stock else full


def _by_fit(bins: list[list[int]], items: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]] | None:
    """Each item in the first bin it fits into, the fullest at the start first; None where one fits nowhere."""
    filled = [list(b) for b in bins]
    rooms = [max_tokens - sum(lengths[i] for i in b) for b in bins]
    fullest_first = sorted(range(len(bins)), key=lambda b: rooms[b])
    for i in items:
        place = next((b for b in fullest_first if rooms[b] >= lengths[i]), None)
        if place is None:
            return None
        filled[place].append(i)
        rooms[place] -= lengths[i]
    return filled


def _whole_ranks(num_bins: int, num_ranks: int, num_items: int) -> int:
    """The smallest multiple of num_ranks that is at least num_bins."""
    wanted = -(-num_bins // num_ranks) * num_ranks
    if wanted > num_items:
        raise ValueError(
            f"num_ranks: wanted at least one length a bin, got {num_items} lengths, which need {num_bins} bins or "
            f"more, on {num_ranks} ranks"
        )
    return wanted
