"""Random orders, one place at a time: complete, even, never another one, and of any size without memory."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.permutation import Permutation, stream

GOLDEN = [
    [8, 6, 2, 0, 1, 4, 9, 7, 5, 3],
    [0, 3, 5, 7, 6, 2, 4, 9, 8, 1],
    [7, 0, 6, 8, 1, 2, 9, 3, 5, 4],
    [2057361221, 4964326809, 2033872120, 1249704960],
]


def whole(size: int, key: int) -> list[int]:
    return Permutation(size, key=key)[np.arange(size)].tolist()


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_everything_comes_once(size: int, key: int) -> None:
    assert sorted(whole(size, key)) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=60)
def test_places_can_be_asked_for_alone(size: int, key: int, data: st.DataObject) -> None:
    order = Permutation(size, key=key)
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True)), dtype=np.int64)
    together = order[places]
    assert together.tolist() == [order[places[i : i + 1]].item() for i in range(len(places))]
    assert len(set(together.tolist())) == len(places)
    assert all(0 <= one < size for one in together.tolist())


def test_the_order_is_written_in_stone() -> None:
    """A run resumed after an upgrade must go on in the same order."""
    found = [whole(10, stream(42, 0)), whole(10, stream(42, 1)), whole(10, stream(43, 0))]
    found += [Permutation(10**10, key=stream(42, 0))[np.arange(4)].tolist()]
    assert found == GOLDEN


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_things_are_equally_frequent(size: int) -> None:
    """Chi squared, whose distribution over keys is near a normal one; 5 standard deviations."""
    expected = 20
    kinds = list(permutations(range(size)))
    found = Counter(tuple(whole(size, stream(7, number))) for number in range(expected * len(kinds)))
    chi_squared = sum((found[kind] - expected) ** 2 / expected for kind in kinds)
    freedom = len(kinds) - 1
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_each_place_sees_each_thing_equally_often() -> None:
    orders = np.array([whole(50, stream(1, epoch)) for epoch in range(1000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=50) for place in range(50)])
    assert (abs(counts - 20) < 6 * np.sqrt(20)).all()


def test_neighbours_part() -> None:
    """How far two neighbours lie apart, of a million: on average a third of the whole; and few stay neighbours."""
    order = Permutation(1_000_000, key=stream(3, 0))[np.arange(100_000)]
    distance = abs(np.diff(order))
    assert abs(distance.mean() / 1_000_000 - 1 / 3) < 0.005
    assert (distance == 1).sum() < 5


def test_no_memory_however_many() -> None:
    tracemalloc.start()
    order = Permutation(10**12, key=1)
    last = order[np.arange(10**12 - 16, 10**12)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(last.tolist())) == 16
    assert peak < 100_000


@pytest.mark.parametrize("place", [-1, 10])
def test_no_place_outside(place: int) -> None:
    with pytest.raises(IndexError, match="of a permutation of 10"):
        Permutation(10, key=1)[np.array([place])]


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_no_size_outside(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 2"):
        Permutation(size, key=1)
