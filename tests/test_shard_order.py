"""An order that follows shards: complete, mixed within a window, each shard needed once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.shard_order import ShardLayout, ShardOrder


def layout_of(sizes: list[int]) -> tuple[np.ndarray, ShardLayout]:
    """Shards of these sizes, their examples dealt over the data set at random."""
    shards = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return shards, ShardLayout.of(shards)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    window=st.integers(1, 40),
    key=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60)
def test_everything_comes_once_whoever_asks(sizes: list[int], window: int, key: int) -> None:
    sizes = [*sizes, 1]
    _, layout = layout_of(sizes)
    order = ShardOrder(layout, window=window, key=key)
    whole = order[np.arange(len(order))]
    assert sorted(whole.tolist()) == list(range(sum(sizes)))
    assert [order[np.array([place])].item() for place in range(len(order))] == whole.tolist()


def test_a_window_after_another() -> None:
    """Of 100 shards of 1 to 12 examples each, 10 at a time: a shard's examples lie within one window's places."""
    sizes = [1 + number % 12 for number in range(100)]
    shards, layout = layout_of(sizes)
    order = ShardOrder(layout, window=10, key=3)
    came = shards[order[np.arange(len(order))]]
    first_places = {shard: np.flatnonzero(came == shard) for shard in range(100)}
    inside = sorted((int(places.min()), int(places.max())) for places in first_places.values())
    windows, end = 0, -1
    for begin, last in inside:
        if begin > end:
            windows += 1
        end = max(end, last)
    assert windows == 10
    assert (np.diff(came[:60]) != 0).mean() > 0.7  # mixed, not shard after shard


def test_one_window_of_all_is_as_random_as_any_order() -> None:
    _, layout = layout_of([5] * 10)
    orders = np.array([ShardOrder(layout, window=10, key=key)[np.arange(50)] for key in range(600)])
    counts = np.stack([np.bincount(orders[:, place], minlength=50) for place in range(50)])
    assert (abs(counts - 12) < 6 * np.sqrt(12)).all()


def test_epochs_have_windows_of_their_own() -> None:
    shards, layout = layout_of([4] * 50)
    first, second = (
        set(shards[ShardOrder(layout, window=5, key=key)[np.arange(20)]].tolist()) for key in (1, 2)
    )
    assert len(first) == len(second) == 5
    assert first != second


def test_no_place_outside() -> None:
    _, layout = layout_of([2, 3])
    with pytest.raises(IndexError, match="of an order of 5"):
        ShardOrder(layout, window=1, key=1)[np.array([5])]
