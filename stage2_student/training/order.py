"""Which examples a step holds, and which of them a rank forwards together: pure functions.

    order    = epoch_order(seed=42, epoch=0, num_examples=480)
    examples = step_examples(7, StepShape(num_examples=480, global_batch_size=16, microbatch_size=4, seed=42))
    rounds   = deal(examples, lengths, num_ranks=2, microbatch_size=4)      # rounds[round][rank]

The examples of a step do not depend on the number of ranks, so a run that goes on with more or fewer ranks
sees the same steps.  An epoch that the global batch does not divide ends with a short step: no example is
dropped, none is seen twice in an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.recipes import Recipe


@dataclass(frozen=True)
class Slot:
    """What one rank forwards in one round of a step.

    A rank with nothing left in a round still takes part in the collectives: it forwards an example whose
    labels do not count (``counts`` is False).
    """

    step: int
    examples: tuple[int, ...]
    counts: bool = True


@dataclass(frozen=True)
class StepShape:
    """The numbers that decide what a step holds, and how much of it a rank forwards at once.

    ``microbatch_size`` is the latter: of the four it may change when a run goes on.
    """

    num_examples: int
    global_batch_size: int
    microbatch_size: int
    seed: int

    @property
    def num_steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch_size)


@lru_cache(maxsize=2)
def epoch_order(*, seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """(num_examples,) int64, read-only, a permutation: the examples sorted by a hash of (seed, epoch, example).

    Ours rather than NumPy's: a shuffle of theirs may change with a version, and a run resumed after an
    upgrade must go on in the same order.
    """
    stream = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    order = np.argsort(_mix(stream ^ _mix(np.arange(num_examples, dtype=np.uint64))), kind="stable")
    order.setflags(write=False)  # all callers of one epoch get the same array
    return order


def step_examples(step: int, shape: StepShape) -> np.ndarray:
    """(n,) int64: the examples of that step, counted from 0 over all epochs; n is smaller in a last step."""
    epoch, step_in_epoch = divmod(step, shape.num_steps_per_epoch)
    order = epoch_order(seed=shape.seed, epoch=epoch, num_examples=shape.num_examples)
    begin = step_in_epoch * shape.global_batch_size
    return order[begin : begin + shape.global_batch_size]


def deal(
    examples: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    *,
    num_ranks: int,
    microbatch_size: int,
) -> list[list[tuple[int, ...]]]:
    """Microbatches by round and rank: examples of like length together, so that little is padding and no
    rank waits long for another.

    lengths  (num_examples,): any measure of an example's size
    Returns  rounds[round][rank], a tuple of at most ``microbatch_size`` examples, empty where none are left
    Holds    every example is dealt once; the same number of rounds for every rank
    """
    by_length = sorted(map(int, examples), key=lambda example: -int(lengths[example]))
    batches = [
        tuple(by_length[begin : begin + microbatch_size])
        for begin in range(0, len(by_length), microbatch_size)
    ]
    batches += [()] * (-len(batches) % num_ranks)
    return [batches[begin : begin + num_ranks] for begin in range(0, len(batches), num_ranks)]


def training_slots(
    shape: StepShape, lengths: np.ndarray, *, steps: range, rank: int, num_ranks: int
) -> Iterator[list[Slot]]:
    """What one rank forwards, one list for each step in turn."""
    for step in steps:
        examples = step_examples(step, shape)
        yield _slots_of(step, examples, lengths, shape.microbatch_size, rank, num_ranks)


def pass_slots(lengths: np.ndarray, *, microbatch_size: int, rank: int, num_ranks: int) -> list[Slot]:
    """What one rank forwards in one pass over a whole split, as in validation."""
    return _slots_of(0, np.arange(len(lengths)), lengths, microbatch_size, rank, num_ranks)


def _slots_of(
    step: int, examples: np.ndarray, lengths: np.ndarray, microbatch_size: int, rank: int, num_ranks: int
) -> list[Slot]:
    rounds = deal(examples, lengths, num_ranks=num_ranks, microbatch_size=microbatch_size)
    shortest = int(min(examples, key=lambda example: lengths[example]))
    mine = [batches[rank] for batches in rounds]
    return [Slot(step, batch) if batch else Slot(step, (shortest,), counts=False) for batch in mine]


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection of 64 bits.  Source: Steele, Lea, Flood, OOPSLA 2014, figure 16."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def step_shape(recipe: Recipe, num_examples: int) -> StepShape:
    return StepShape(
        num_examples=num_examples,
        global_batch_size=recipe.optimization.global_batch_size,
        microbatch_size=recipe.optimization.microbatch_size,
        seed=recipe.run.seed,
    )


def total_steps(recipe: Recipe, shape: StepShape) -> int:
    if recipe.optimization.max_steps is not None:
        return recipe.optimization.max_steps
    assert recipe.optimization.num_epochs is not None  # the recipe has one of the two
    return max(1, round(recipe.optimization.num_epochs * shape.num_steps_per_epoch))
