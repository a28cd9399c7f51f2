"""The order of examples: complete, the same for any number of ranks, and never another one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dealing import Limits
from stage2_student.training.order import (
    StepShape,
    dealt,
    epoch_order,
    pass_slots,
    step_examples,
    training_slots,
)

SIZES = st.integers(1, 60)
GOLDEN = (
    [9, 4, 0, 3, 5, 1, 6, 2, 7, 8],
    [2, 0, 7, 6, 3, 1, 9, 4, 5, 8],
    [3, 5, 1, 4, 0, 7, 6, 2, 9, 8],
)


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), num_examples=SIZES)
def test_an_epoch_holds_every_example_once(seed: int, epoch: int, num_examples: int) -> None:
    order = epoch_order(seed=seed, epoch=epoch, num_examples=num_examples)
    assert sorted(order.tolist()) == list(range(num_examples))


def test_the_order_is_written_in_stone() -> None:
    """A run resumed after an upgrade must go on in the same order."""
    assert epoch_order(seed=42, epoch=0, num_examples=10).tolist() == GOLDEN[0]
    assert epoch_order(seed=42, epoch=1, num_examples=10).tolist() == GOLDEN[1]
    assert epoch_order(seed=43, epoch=0, num_examples=10).tolist() == GOLDEN[2]


def test_nobody_can_change_the_order_for_others() -> None:
    for order in (
        epoch_order(seed=1, epoch=0, num_examples=8),
        step_examples(0, StepShape(8, 4, Limits(examples=1), seed=1)),
    ):
        with pytest.raises(ValueError, match="read-only"):
            order.sort()


def test_orders_look_random() -> None:
    """Each place sees each example about equally often over many epochs."""
    orders = np.stack([epoch_order(seed=1, epoch=epoch, num_examples=8) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    assert (abs(counts - 500) < 6 * np.sqrt(500)).all()


@given(num_examples=SIZES, batch=SIZES, num_steps=st.integers(1, 30))
def test_steps_cut_epochs_into_batches_with_a_short_last_one(
    num_examples: int, batch: int, num_steps: int
) -> None:
    shape = StepShape(num_examples, batch, Limits(examples=1), seed=7)
    seen: Counter[int] = Counter()
    for step in range(shape.num_steps_per_epoch):
        seen.update(step_examples(step, shape).tolist())
    assert seen == Counter(range(num_examples))
    sizes = [len(step_examples(step, shape)) for step in range(num_steps)]
    whole, rest = divmod(num_examples, batch)
    epoch = [batch] * whole + [rest] * (rest > 0)
    assert sizes == [epoch[step % len(epoch)] for step in range(num_steps)]


def test_examples_are_dealt_by_their_own_numbers() -> None:
    lengths = np.array([5, 90, 7, 80, 6])
    assert dealt([4, 1, 3], lengths, num_ranks=2, limits=Limits(examples=1)) == [((1,), (3,)), ((4,), ())]


@given(num_examples=SIZES, microbatch=st.integers(1, 5), num_ranks=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_all_ranks_together_forward_the_examples_of_each_step_once(
    num_examples: int, microbatch: int, num_ranks: int
) -> None:
    shape = StepShape(num_examples, microbatch * num_ranks * 2, Limits(examples=microbatch), seed=3)
    lengths = np.arange(num_examples)
    ranks = [
        list(training_slots(shape, lengths, steps=range(4), rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    for step in range(4):
        slots = [slot for rank in ranks for slot in rank[step]]
        assert len({len(rank[step]) for rank in ranks}) == 1
        counted = [example for slot in slots if slot.counts for example in slot.examples]
        assert sorted(counted) == sorted(step_examples(step, shape).tolist())
        assert all(len(slot.examples) == 1 for slot in slots if not slot.counts)


def test_a_pass_takes_every_example_once_however_many_ranks() -> None:
    lengths = np.array([3, 1, 2, 5, 4])
    ranks = [pass_slots(lengths, limits=Limits(examples=2), rank=rank, num_ranks=6) for rank in range(6)]
    assert [len(slots) for slots in ranks] == [1] * 6
    assert sorted(e for slots in ranks for slot in slots if slot.counts for e in slot.examples) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert ranks[5][0].examples == (1,)  # the shortest, and it does not count
    assert not ranks[5][0].counts
