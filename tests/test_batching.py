"""Batches of like length: a partition, under the budget, and smaller for good after an out-of-memory error."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.batching import BatchRunner, batches_of_like_length
from shared.errors import TrainingError

lengths_lists = st.lists(st.integers(1, 300), max_size=60)


@given(lengths_lists, st.integers(1, 1000))
def test_batches_are_a_partition_under_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = batches_of_like_length(lengths, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[index] for index in batch) * len(batch)
        assert padded <= max_tokens or len(batch) == 1


@given(lengths_lists)
def test_lengths_never_rise_along_the_batches(lengths: list[int]) -> None:
    order = [lengths[i] for batch in batches_of_like_length(lengths, max_tokens=400) for i in batch]
    assert order == sorted(order, reverse=True)


@given(lengths_lists, st.integers(50, 700))
def test_every_example_is_run_once_on_a_device_that_holds_less_than_the_budget(
    lengths: list[int], capacity: int
) -> None:
    runner = BatchRunner(max_tokens=1200)

    def forward(batch: list[int]) -> int:
        size = max(lengths[index] for index in batch) * len(batch)
        if len(batch) > 1 and size > capacity:
            raise torch.OutOfMemoryError
        return size

    done = [index for batch, _ in runner.run(lengths, forward) for index in batch]
    assert sorted(done) == list(range(len(lengths)))


def test_the_smaller_size_is_remembered() -> None:
    runner, failures = BatchRunner(max_tokens=80), 0

    def forward(batch: list[int]) -> None:
        nonlocal failures
        if len(batch) * 10 > 30:
            failures += 1
            raise torch.OutOfMemoryError

    for _ in range(5):
        list(runner.run([10] * 16, forward))
    assert runner.max_tokens == 20
    assert failures == 2  # 80 tokens, 40 tokens, then never again


def test_memory_is_emptied_when_the_failed_batch_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(num_alive()))

    def num_alive() -> int:
        return sum(reference() is not None for reference in failed)

    def forward(batch: list[int]) -> None:
        assert num_alive() == 0
        activations = torch.zeros(len(batch))
        if len(batch) > 2:
            failed.append(weakref.ref(activations))
            raise torch.OutOfMemoryError

    list(BatchRunner(max_tokens=80).run([10] * 8, forward))
    assert len(failed) == 2
    assert alive == [0, 0]


def test_a_single_sequence_that_does_not_fit_says_what_to_do() -> None:
    def forward(batch: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(TrainingError, match=r"one sequence of 7 tokens .*data\.max_pixels"):
        list(BatchRunner(max_tokens=7).run([7, 3], forward))
