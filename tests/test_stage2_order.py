"""The order of examples: complete, the same for any number of ranks, and never another one."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dealing import Limits, Work
from stage2_student.training.order import (
    StepShape,
    dealt,
    epoch_order,
    pass_slots,
    step_examples,
    training_slots,
)

SIZES = st.integers(1, 60)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        epoch_order(StepShape(100, 4, Limits(examples=1), seed=seed), epoch)[np.arange(100)].tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert [sorted(order) for order in orders] == [list(range(100))] * 3
    assert len({tuple(order) for order in orders}) == 3


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
    assert dealt([4, 1, 3], Work.of(lengths), num_ranks=2, limits=Limits(examples=1)) == [
        ((1,), (3,)),
        ((4,), ()),
    ]


@given(num_examples=SIZES, microbatch=st.integers(1, 5), num_ranks=st.integers(1, 5))
@settings(max_examples=30)
def test_all_ranks_together_forward_the_examples_of_each_step_once(
    num_examples: int, microbatch: int, num_ranks: int
) -> None:
    shape = StepShape(num_examples, microbatch * num_ranks * 2, Limits(examples=microbatch), seed=3)
    work = Work.of(np.arange(num_examples))
    ranks = [
        list(training_slots(shape, work, steps=range(4), rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    for step in range(4):
        slots = [slot for rank in ranks for slot in rank[step]]
        assert len({len(rank[step]) for rank in ranks}) == 1
        counted = [example for slot in slots if slot.counts for example in slot.examples]
        assert sorted(counted) == sorted(step_examples(step, shape).tolist())
        assert all(len(slot.examples) == 1 for slot in slots if not slot.counts)


def test_a_pass_takes_every_example_once_however_many_ranks() -> None:
    work = Work.of([3, 1, 2, 5, 4])
    ranks = [pass_slots(work, limits=Limits(examples=2), rank=rank, num_ranks=6) for rank in range(6)]
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
