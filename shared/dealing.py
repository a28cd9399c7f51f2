"""Sequences of different lengths, dealt to ranks so that little is padding and no rank waits long for another.

    rounds = deal([700, 120, 90, 300], num_ranks=2, limits=Limits(tokens=4096))
    rounds[0]          # ((0,), (3, 1, 2)): what each rank forwards at once, as places in the list

Ranks step together, so a round takes as long as its costliest microbatch, and a deal as long as the sum of these.
The longest come first: a microbatch costs its longest sequence times their number, so neighbours in length belong
together.  Under one ceiling for a round, taking from the longest on as many as the ceiling allows leaves the fewest
for later; which ceilings to set is a shortest path over how many are left.

A pure function of its arguments, in whole numbers: every rank finds the same deal for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Deal = list[tuple[tuple[int, ...], ...]]

BLOCK = 1024  # sequences that are planned together; of more, neighbours in length are
ROUND_TOKENS = 64  # that one more round must save: it has costs of its own
UNREACHED = np.iinfo(np.int64).max
FINENESS = 100  # ceilings that are tried lie one part in so many apart


@dataclass(frozen=True)
class Limits:
    """Of one microbatch; one longer sequence is a microbatch of its own.

    tokens    padding counted; None: no limit
    examples  None: no limit
    """

    tokens: int | None = None
    examples: int | None = None


def deal(lengths: Sequence[int] | Ints, *, num_ranks: int, limits: Limits) -> Deal:
    """Microbatches by round and rank, as places in ``lengths``; a rank may have none in a round.

    lengths  (n,) tokens, at least 1
    Holds    every sequence is dealt once, within the limits; all rounds have ``num_ranks`` microbatches
    """
    lengths_n = np.maximum(1, np.asarray(lengths, dtype=np.int64))
    order_n = np.argsort(-lengths_n, kind="stable")
    rounds: Deal = []
    for begin in range(0, len(order_n), BLOCK):
        block = order_n[begin : begin + BLOCK]
        cuts = _cuts(lengths_n[block], num_ranks, limits)
        rounds += [
            tuple(tuple(block[start:stop].tolist()) for start, stop in itertools.pairwise(ends))
            for ends in cuts
        ]
    return rounds


def critical_path(rounds: Deal, lengths: Sequence[int] | Ints) -> int:
    """Tokens' worth of time that the deal takes: the costliest microbatch of each round, summed."""
    return sum(max(costs) for costs in _costs(rounds, lengths))


def waiting_share(rounds: Deal, lengths: Sequence[int] | Ints) -> float:
    """0 to 1: how much of the ranks' time is waiting for the slowest of a round."""
    costs = _costs(rounds, lengths)
    slowest = sum(max(one) * len(one) for one in costs)
    return 1 - sum(map(sum, costs)) / slowest if slowest else 0.0


def padding_share(rounds: Deal, lengths: Sequence[int] | Ints) -> float:
    """0 to 1: how much of what is forwarded is padding."""
    padded = sum(map(sum, _costs(rounds, lengths)))
    return (
        1 - sum(int(lengths[i]) for ranks in rounds for one in ranks for i in one) / padded if padded else 0.0
    )


def _costs(rounds: Deal, lengths: Sequence[int] | Ints) -> list[list[int]]:
    """Of each microbatch, by round and rank: its tokens, padding counted."""
    return [
        [len(places) * max((int(lengths[i]) for i in places), default=0) for places in ranks]
        for ranks in rounds
    ]


def _cuts(lengths_n: Ints, num_ranks: int, limits: Limits) -> list[list[int]]:
    """Of sequences from the longest on: for each round the places at which its microbatches begin and end."""
    total = len(lengths_n)
    ceilings_c, next_nc = _steps(lengths_n, limits)
    round_nc = _repeated(next_nc, num_ranks)
    cost_n = np.zeros(total + 1, np.int64)
    chosen_n = np.zeros(total, np.int64)
    for place in range(total - 1, -1, -1):
        costs_c = ceilings_c + ROUND_TOKENS + cost_n[round_nc[place]]
        costs_c[round_nc[place] == place] = UNREACHED
        chosen_n[place] = costs_c.argmin()
        cost_n[place] = costs_c[chosen_n[place]]
    cuts, place = [], 0
    while place < total:
        ends = [place]
        for _ in range(num_ranks):
            ends.append(int(next_nc[ends[-1], chosen_n[place]]))
        cuts.append(ends)
        place = ends[-1]
    return cuts


def _steps(lengths_n: Ints, limits: Limits) -> tuple[Ints, Ints]:
    """Ceilings of a microbatch's cost, (C,), and where one ends that begins at each place, (n + 1, C)."""
    total = len(lengths_n)
    most_n = total - np.arange(total)
    if limits.tokens is not None:
        most_n = np.minimum(most_n, np.maximum(1, limits.tokens // lengths_n))
    if limits.examples is not None:
        most_n = np.minimum(most_n, limits.examples)
    costs = [length * np.arange(1, most + 1) for length, most in zip(lengths_n, most_n.tolist(), strict=True)]
    singles = {int(one[0]) for one in costs}
    ceilings_c = np.array(
        sorted(singles | _spaced(min(singles), max(int(one[-1]) for one in costs))), np.int64
    )
    next_nc = np.full((total + 1, len(ceilings_c)), total, np.int64)
    for place, one in enumerate(costs):
        next_nc[place] = place + np.searchsorted(one, ceilings_c, side="right")
    return ceilings_c, next_nc


def _spaced(least: int, most: int) -> set[int]:
    found = {most}
    while least < most:
        found.add(least)
        least += max(1, least // FINENESS)
    return found


def _repeated(next_nc: Ints, times: int) -> Ints:
    """Where ``times`` microbatches in a row end, by squaring."""
    result, power = None, next_nc
    while times:
        if times & 1:
            result = power if result is None else np.take_along_axis(power, result, axis=0)
        times >>= 1
        if times:
            power = np.take_along_axis(power, power, axis=0)
    assert result is not None
    return result
