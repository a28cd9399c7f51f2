"""Sequences of different lengths, dealt to ranks so that little is padding and no rank waits long for another.

    work = Work.of([700, 120, 90, 300])
    rounds = deal(work, num_ranks=2, limits=Limits(tokens=4096))
    rounds[0]          # ((0,), (3, 1, 2)): what each rank forwards at once, as places in the list

Ranks step together, so a round takes as long as its costliest microbatch, and a deal as long as the sum of these.

Padded, a microbatch costs its longest sequence times their number, so neighbours in length belong together and the
longest come first.  Under one ceiling for a round, taking from the longest on as many as the ceiling allows leaves
the fewest for later; which ceilings to set is a shortest path over how many are left.

Packed, it costs the sum of its sequences, whichever they are: the costliest first, each to the microbatch that costs
least so far; then exchanges with the costliest microbatch, as long as one helps.

Pictures cost a vision tower work besides, which is counted in tokens of the language model.

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
MAX_EXCHANGES = 1000  # of a packed deal
EVEN = 1.005  # times the mean: a microbatch of it is left as it is


@dataclass(frozen=True)
class Limits:
    """Of one microbatch; one longer sequence is a microbatch of its own.

    tokens    padding counted; None: no limit
    examples  None: no limit
    """

    tokens: int | None = None
    examples: int | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """What n sequences ask of the ranks that forward them.

    lengths   (n,) tokens, at least 1
    pictures  (n,) what their pictures cost the tower, in tokens of the language model
    packed    the sequences of a microbatch follow each other in one row, without padding
    """

    lengths: Ints
    pictures: Ints
    packed: bool = False

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | Ints,
        pictures: Sequence[int] | Ints | None = None,
        *,
        packed: bool = False,
    ) -> Work:
        """``pictures`` None: they cost nothing."""
        lengths_n = np.maximum(1, np.asarray(lengths, dtype=np.int64))
        pictures_n = np.zeros_like(lengths_n) if pictures is None else np.asarray(pictures, dtype=np.int64)
        return cls(lengths_n, pictures_n, packed)

    def __len__(self) -> int:
        return len(self.lengths)

    def chosen(self, places: Ints) -> Work:
        return Work(self.lengths[places], self.pictures[places], self.packed)

    def tokens(self, places: Sequence[int]) -> int:
        """That a microbatch of these sequences forwards, padding counted."""
        lengths = self.lengths[list(places)]
        return int(lengths.sum() if self.packed else len(lengths) * lengths.max(initial=0))

    def picture_cost(self, places: Sequence[int]) -> int:
        return int(self.pictures[list(places)].sum())

    def cost(self, places: Sequence[int]) -> int:
        """Of such a microbatch, in tokens."""
        return self.tokens(places) + self.picture_cost(places)


def deal(work: Work, *, num_ranks: int, limits: Limits) -> Deal:
    """Microbatches by round and rank, as places in ``work``; a rank may have none in a round.

    Holds    every sequence is dealt once, within the limits; all rounds have ``num_ranks`` microbatches
    """
    order_n = np.lexsort((-work.pictures, -work.lengths))
    rounds: Deal = []
    for begin in range(0, len(order_n), BLOCK):
        block = order_n[begin : begin + BLOCK]
        part = work.chosen(block)
        dealt = _packed(part, num_ranks, limits) if work.packed else _padded(part, num_ranks, limits)
        rounds += [tuple(tuple(block[list(places)].tolist()) for places in ranks) for ranks in dealt]
    return rounds


def critical_path(rounds: Deal, work: Work) -> int:
    """Tokens' worth of time that the deal takes: the costliest microbatch of each round, summed."""
    return sum(max(costs) for costs in _costs(rounds, work))


def waiting_share(rounds: Deal, work: Work) -> float:
    """0 to 1: how much of the ranks' time is waiting for the slowest of a round."""
    costs = _costs(rounds, work)
    slowest = sum(max(one) * len(one) for one in costs)
    return 1 - sum(map(sum, costs)) / slowest if slowest else 0.0


def padding_share(rounds: Deal, work: Work) -> float:
    """0 to 1: how much of what is forwarded is padding."""
    batches = list(itertools.chain(*rounds))
    forwarded = sum(map(work.tokens, batches))
    own = sum(int(work.lengths[list(places)].sum()) for places in batches)
    return 1 - own / forwarded if forwarded else 0.0


def _costs(rounds: Deal, work: Work) -> list[list[int]]:
    """Of each microbatch, by round and rank."""
    return [[work.cost(places) for places in ranks] for ranks in rounds]


def _padded(work: Work, num_ranks: int, limits: Limits) -> Deal:
    """Of sequences from the longest on: which of them, in a row, each microbatch takes."""
    total = len(work)
    ceilings_c, next_nc = _steps(work, limits)
    round_nc = _repeated(next_nc, num_ranks)
    cost_n = np.zeros(total + 1, np.int64)
    chosen_n = np.zeros(total, np.int64)
    for place in range(total - 1, -1, -1):
        costs_c = ceilings_c + ROUND_TOKENS + cost_n[round_nc[place]]
        costs_c[round_nc[place] == place] = UNREACHED
        chosen_n[place] = costs_c.argmin()
        cost_n[place] = costs_c[chosen_n[place]]
    rounds: Deal = []
    place = 0
    while place < total:
        ends = [place]
        for _ in range(num_ranks):
            ends.append(int(next_nc[ends[-1], chosen_n[place]]))
        rounds.append(tuple(tuple(range(start, stop)) for start, stop in itertools.pairwise(ends)))
        place = ends[-1]
    return rounds


def _steps(work: Work, limits: Limits) -> tuple[Ints, Ints]:
    """Ceilings of a microbatch's cost, (C,), and where one ends that begins at each place, (n + 1, C)."""
    total = len(work)
    most_n = total - np.arange(total)
    if limits.tokens is not None:
        most_n = np.minimum(most_n, np.maximum(1, limits.tokens // work.lengths))
    if limits.examples is not None:
        most_n = np.minimum(most_n, limits.examples)
    costs = [
        work.lengths[place] * np.arange(1, most + 1) + work.pictures[place : place + most].cumsum()
        for place, most in enumerate(most_n.tolist())
    ]
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


def _packed(work: Work, num_ranks: int, limits: Limits) -> Deal:
    """In as few rounds as the limits allow: more of them are never shorter."""
    num_rounds = _least_rounds(work, num_ranks, limits)
    while (owner_n := _owners(work, num_ranks * num_rounds, limits)) is None:
        num_rounds += 1
    _exchange(owner_n, work, num_ranks * num_rounds, limits)
    batches = [tuple(np.flatnonzero(owner_n == one).tolist()) for one in range(num_ranks * num_rounds)]
    batches.sort(key=work.cost, reverse=True)  # so that those of a round are alike
    return [tuple(batches[begin : begin + num_ranks]) for begin in range(0, len(batches), num_ranks)]


def _least_rounds(work: Work, num_ranks: int, limits: Limits) -> int:
    by_tokens = 1
    if limits.tokens is not None:
        fitting = work.lengths[work.lengths <= limits.tokens]
        by_tokens = -(-int(fitting.sum()) // (limits.tokens * num_ranks))
    by_examples = 1 if limits.examples is None else -(-len(work) // (limits.examples * num_ranks))
    return max(1, by_tokens, by_examples)


def _owners(work: Work, num_batches: int, limits: Limits) -> Ints | None:
    """(n,) which microbatch takes each sequence; None where so many microbatches do not suffice."""
    cost_b, tokens_b, examples_b = np.zeros((3, num_batches), np.int64)
    owner_n = np.zeros(len(work), np.int64)
    cost_n = work.lengths + work.pictures
    for place in np.argsort(-cost_n, kind="stable").tolist():
        is_open_b = _allowed(tokens_b + work.lengths[place], examples_b + 1, limits)
        if not is_open_b.any():
            return None
        owner = int(np.where(is_open_b, cost_b, UNREACHED).argmin())
        owner_n[place] = owner
        cost_b[owner] += cost_n[place]
        tokens_b[owner] += work.lengths[place]
        examples_b[owner] += 1
    return owner_n


def _exchange(owner_n: Ints, work: Work, num_batches: int, limits: Limits) -> None:
    """Makes the costliest microbatch cheaper, in place; once nothing helps it, the next one."""
    cost_n, settled = work.lengths + work.pictures, 0
    # Beside the sequences, nothing at all: of each microbatch one, so that a sequence may also move alone.
    values_m3 = np.zeros((len(work) + num_batches, 3), np.int64)
    values_m3[: len(work)] = np.stack([cost_n, work.lengths, np.ones_like(cost_n)], axis=1)
    owner_m = np.concatenate([owner_n, np.arange(num_batches)])
    for _ in range(MAX_EXCHANGES):
        totals_b3 = np.stack([np.bincount(owner_m, one, num_batches) for one in values_m3.T], 1).astype(
            np.int64
        )
        costliest = int(np.argsort(-totals_b3[:, 0], kind="stable")[settled])
        if totals_b3[costliest, 0] * num_batches <= totals_b3[:, 0].sum() * EVEN:
            break
        own, others = np.flatnonzero(owner_m == costliest), np.flatnonzero(owner_m != costliest)
        moved_ij3 = values_m3[own, None] - values_m3[None, others]
        mine_ij3, theirs_ij3 = totals_b3[costliest] - moved_ij3, totals_b3[owner_m[others]] + moved_ij3
        larger_ij = np.maximum(mine_ij3[..., 0], theirs_ij3[..., 0])
        for after_ij3 in (mine_ij3, theirs_ij3):
            larger_ij[~_allowed(after_ij3[..., 1], after_ij3[..., 2], limits)] = UNREACHED
        if not larger_ij.size or larger_ij.min() >= totals_b3[costliest, 0]:
            settled += 1
            if settled == num_batches:
                break
            continue
        i, j = np.unravel_index(larger_ij.argmin(), larger_ij.shape)
        owner_m[own[i]], owner_m[others[j]] = owner_m[others[j]], costliest
    owner_n[:] = owner_m[: len(work)]


def _allowed(tokens: Ints, examples: Ints, limits: Limits) -> npt.NDArray[np.bool_]:
    """Where a microbatch is within the limits; one example alone always is."""
    is_allowed = np.ones(tokens.shape, bool)
    if limits.tokens is not None:
        is_allowed &= tokens <= limits.tokens
    if limits.examples is not None:
        is_allowed &= examples <= limits.examples
    return is_allowed | (examples <= 1)
