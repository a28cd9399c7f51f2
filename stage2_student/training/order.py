"""Which examples a step holds, and which of them a rank forwards together: pure functions.

    shape    = StepShape(num_examples=480, global_batch_size=16, limits=Limits(tokens=4096), seed=42)
    examples = step_examples(7, shape)
    rounds   = dealt(examples, work, num_ranks=2, limits=shape.limits)      # rounds[round][rank]

The examples of a step do not depend on the number of ranks, so a run that goes on with more or fewer ranks
sees the same steps.  An epoch that the global batch does not divide ends with a short step: no example is
dropped, none is seen twice in an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.dealing import Deal, Limits, Work, deal, padding_share, waiting_share
from shared.permutation import Permutation, stream
from shared.recipes import OptimizationConfig, Recipe
from shared.shard_order import ShardLayout, ShardOrder

DEFAULT_MICROBATCH_TOKENS = 4096
MAX_COUNTED = 200
ORDER_OF_EXAMPLES = "Feistel network, 24 rounds"  # a run whose steps come in another order cannot go on


@dataclass(frozen=True)
class Slot:
    """What one rank forwards in one round of a step.

    A rank with nothing left in a round still takes part in the collectives: it forwards an example whose
    labels do not count (``counts`` is False).

    picture_cost  of its examples, in tokens; 0 where they do not count
    """

    step: int
    examples: tuple[int, ...]
    counts: bool = True
    picture_cost: int = 0


@dataclass(frozen=True)
class StepShape:
    """The numbers that decide what a step holds, and how much of it a rank forwards at once.

    ``limits`` are the latter: of all of these they alone may change when a run goes on.

    layout, window  where examples lie, and how many shards' examples are mixed; None: the order follows no shards
    first_step      of the run, in the steps of the order
    """

    num_examples: int
    global_batch_size: int
    limits: Limits
    seed: int
    layout: ShardLayout | None = None
    window: int = 0
    first_step: int = 0

    @property
    def num_steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch_size)


@lru_cache(maxsize=2)
def epoch_order(shape: StepShape, epoch: int) -> Permutation | ShardOrder:
    """Of all examples, one place at a time.

    Ours rather than NumPy's: a shuffle of theirs may change with a version, and a run resumed after an
    upgrade must go on in the same order.
    """
    key = stream(shape.seed, epoch)
    if shape.layout is None:
        return Permutation(shape.num_examples, key=key)
    return ShardOrder(shape.layout, window=shape.window, key=key)


def step_examples(step: int, shape: StepShape) -> np.ndarray:
    """(n,) int64: the examples of that step of a run, counted over all epochs; n is smaller in an epoch's last."""
    epoch, step_in_epoch = divmod(shape.first_step + step, shape.num_steps_per_epoch)
    order = epoch_order(shape, epoch)
    begin = step_in_epoch * shape.global_batch_size
    return order[np.arange(begin, min(begin + shape.global_batch_size, shape.num_examples))]


def dealt(examples: Sequence[int] | np.ndarray, work: Work, *, num_ranks: int, limits: Limits) -> Deal:
    """``shared.dealing.deal`` of some of the examples, by their own numbers; ``work`` is of all of them."""
    chosen = np.asarray(examples)
    rounds = deal(work.chosen(chosen), num_ranks=num_ranks, limits=limits)
    return [tuple(tuple(chosen[list(places)].tolist()) for places in ranks) for ranks in rounds]


def training_slots(
    shape: StepShape, work: Work, *, steps: range, rank: int, num_ranks: int
) -> Iterator[list[Slot]]:
    """What one rank forwards, one list for each step in turn."""
    for step in steps:
        examples = step_examples(step, shape)
        yield _slots_of(step, examples, work, shape.limits, rank, num_ranks)


def pass_slots(work: Work, *, limits: Limits, rank: int, num_ranks: int) -> list[Slot]:
    """What one rank forwards in one pass over a whole split, as in validation."""
    return _slots_of(0, np.arange(len(work)), work, limits, rank, num_ranks)


def _slots_of(
    step: int, examples: np.ndarray, work: Work, limits: Limits, rank: int, num_ranks: int
) -> list[Slot]:
    rounds = dealt(examples, work, num_ranks=num_ranks, limits=limits)
    own = work.chosen(examples)
    cheapest = int(examples[(own.lengths + own.pictures).argmin()])
    for_company = Slot(step, (cheapest,), counts=False)
    mine = [batches[rank] for batches in rounds]
    return [
        Slot(step, batch, picture_cost=work.picture_cost(batch)) if batch else for_company for batch in mine
    ]


def step_shape(recipe: Recipe, num_examples: int, layout: ShardLayout | None = None) -> StepShape:
    """layout  where examples lie, if their order follows the shards of the recipe's cache"""
    window = 0 if layout is None or recipe.cache is None else recipe.cache.shuffle_window
    assert window != "auto"  # chosen when the cache was opened
    return StepShape(
        num_examples=num_examples,
        global_batch_size=recipe.optimization.global_batch_size,
        limits=limits_of(recipe.optimization),
        seed=recipe.run.seed,
        layout=layout,
        window=window,
        first_step=recipe.optimization.first_step or 0,
    )


@dataclass(frozen=True)
class StepCosts:
    """Of some steps together, by the examples' lengths and pictures.

    padding  0 to 1: the share of forwarded tokens that is padding
    waiting  0 to 1: the share of the ranks' time in which they wait for the slowest of a round
    """

    num_ranks: int
    rounds_per_step: float
    padding: float
    waiting: float

    def __str__(self) -> str:
        return (
            f"{self.rounds_per_step:.1f} microbatch(es) on each of {self.num_ranks} rank(s); "
            f"padding {self.padding:.1%}, waiting {self.waiting:.1%}"
        )


def step_costs(shape: StepShape, work: Work, num_ranks: int) -> StepCosts:
    """Of the first steps of an epoch, at most ``MAX_COUNTED``."""
    num_steps = min(shape.num_steps_per_epoch, MAX_COUNTED)
    rounds = [
        one
        for step in range(num_steps)
        for one in dealt(step_examples(step, shape), work, num_ranks=num_ranks, limits=shape.limits)
    ]
    padding, waiting = padding_share(rounds, work), waiting_share(rounds, work)
    return StepCosts(num_ranks, len(rounds) / num_steps, padding, waiting)


def limits_of(config: OptimizationConfig) -> Limits:
    is_free = config.microbatch_tokens is None and config.microbatch_size is None
    tokens = DEFAULT_MICROBATCH_TOKENS if is_free else config.microbatch_tokens
    return Limits(tokens=tokens, examples=config.microbatch_size)


def total_steps(recipe: Recipe, shape: StepShape) -> int:
    return recipe.optimization.num_steps(shape.num_examples)
