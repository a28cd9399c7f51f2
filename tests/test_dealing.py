"""Dealing sequences to ranks: complete, within the limits, balanced, and never worse than what it replaced."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dealing import BLOCK, ROUND_TOKENS, Limits, critical_path, deal, padding_share, waiting_share

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=40)


@given(
    lengths=LENGTHS,
    num_ranks=st.integers(1, 9),
    tokens=st.none() | st.integers(1, 2000),
    examples=st.none() | st.integers(1, 9),
)
def test_every_sequence_is_dealt_once_within_the_limits(
    lengths: list[int], num_ranks: int, tokens: int | None, examples: int | None
) -> None:
    rounds = deal(lengths, num_ranks=num_ranks, limits=Limits(tokens, examples))
    batches = list(itertools.chain(*rounds))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(ranks) == num_ranks for ranks in rounds)
    for batch in batches:
        assert examples is None or len(batch) <= examples
        if tokens is not None and len(batch) > 1:
            assert len(batch) * max(lengths[i] for i in batch) <= tokens
    assert rounds == deal(lengths, num_ranks=num_ranks, limits=Limits(tokens, examples))


def by_number(lengths: list[int], num_ranks: int, size: int) -> int:
    """The critical path of microbatches of so many examples each, in the order of their lengths."""
    order = sorted(lengths, reverse=True)
    costs = [size * order[begin] for begin in range(0, len(order), size)]
    return sum(costs[begin] for begin in range(0, len(costs), num_ranks))


@given(lengths=LENGTHS, num_ranks=st.integers(1, 9), size=st.integers(1, 9))
def test_no_deal_takes_longer_than_one_by_number(lengths: list[int], num_ranks: int, size: int) -> None:
    """But for the price of a round, which it may save."""
    rounds = deal(lengths, num_ranks=num_ranks, limits=Limits(examples=size))
    saved = -(-len(lengths) // size // num_ranks) * ROUND_TOKENS
    assert critical_path(rounds, lengths) <= 1.01 * by_number(lengths, num_ranks, size) + saved + 1


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), num_ranks=st.integers(1, 3))
@settings(max_examples=40)
def test_one_round_is_the_best_one(lengths: list[int], num_ranks: int) -> None:
    """Against every way of giving sequences to ranks at once."""

    def slowest(ranks: tuple[int, ...]) -> int:
        own = [[n for n, rank in zip(lengths, ranks, strict=True) if rank == r] for r in range(num_ranks)]
        return max(len(one) * max(one, default=0) for one in own)

    best = min(map(slowest, itertools.product(range(num_ranks), repeat=len(lengths))))
    assert critical_path(deal(lengths, num_ranks=num_ranks, limits=Limits()), lengths) <= 1.011 * best + 1


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 64])
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_lengths_as_data_have_them_leave_little_waiting(num_ranks: int, batch: int) -> None:
    """Few sequences on many ranks are the hard case: a rank has two or three, and there is nothing in between."""
    generator = np.random.default_rng(0)
    bound = taken = 0.0
    for _ in range(12):
        lengths = np.exp(generator.normal(4.7, 0.35, batch)).astype(np.int64) + 1
        rounds = deal(lengths, num_ranks=num_ranks, limits=Limits(tokens=4096))
        taken += critical_path(rounds, lengths)
        bound += max(lengths.max(), lengths.sum() / num_ranks)
    assert taken / bound <= (1.35 if 1 < batch / num_ranks < 5 else 1.2)


def test_shares() -> None:
    by_hand = [((0, 3), (1,)), ((2,), ())]
    assert padding_share(by_hand, [10, 10, 6, 4]) == pytest.approx(1 - 30 / 36)
    assert waiting_share(by_hand, [10, 10, 6, 4]) == pytest.approx(1 - 36 / 52)
    assert padding_share([], []) == waiting_share([], []) == 0


def test_many_sequences_are_planned_in_blocks() -> None:
    lengths = np.arange(1, 2 * BLOCK + 10)
    rounds = deal(lengths, num_ranks=3, limits=Limits(tokens=8192))
    dealt = [i for ranks in rounds for batch in ranks for i in batch]
    assert sorted(dealt) == list(range(len(lengths)))
    assert padding_share(rounds, lengths) < 0.05
