"""What workers send arrives as it was made."""

from __future__ import annotations

import ctypes
import os
import pickle
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.data.loading import ALIGNMENT, NICENESS, PackedDataset, begin_worker, loaded_items, pack, unpack
from shared.errors import DataError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@dataclass
class Item:
    name: str
    tensors: dict[str, Tensor]
    more: list[Tensor]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_values_come_back_bit_for_bit(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [(torch.rand(shape) * 200).to(dtype) for dtype, shape in kinds]
    item = Item("a", {str(number): tensor for number, tensor in enumerate(tensors)}, tensors[:1])
    packed = pickle.loads(pickle.dumps(pack(item)))
    found = unpack(packed)
    assert found.name == "a"
    for number, tensor in enumerate(tensors):
        copy = found.tensors[str(number)]
        assert copy.dtype == tensor.dtype
        assert copy.shape == tensor.shape
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() % min(ALIGNMENT, copy.dtype.itemsize) == 0
    assert len(found.more) == len(tensors[:1])


def test_strided_and_shared_tensors_come_back_as_their_values() -> None:
    whole = torch.arange(12.0).view(3, 4)
    found = unpack(pack([whole.t(), whole[:, 1], whole[0].expand(5, 4)]))
    assert torch.equal(found[0], whole.t())
    assert torch.equal(found[1], whole[:, 1])
    assert torch.equal(found[2], whole[0].expand(5, 4))


class Niceness(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return os.nice(0)


def test_a_worker_makes_way_for_its_parent() -> None:
    loader = DataLoader(Niceness(), batch_size=None, num_workers=1, worker_init_fn=begin_worker)
    assert list(loader) == [min(19, os.nice(0) + NICENESS)]


class Descriptors(Dataset):
    """How many files the worker has open, beside something to send."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return len(os.listdir("/proc/self/fd")), torch.ones(1000)


def test_a_worker_closes_what_was_taken() -> None:
    source = PackedDataset(Descriptors(), workers_setting="run.num_workers")
    loader: DataLoader = DataLoader(source, sampler=range(60), batch_size=None, num_workers=1)
    counts = [count for count, _ in loaded_items(loader, workers_setting="run.num_workers")]
    assert max(counts) - counts[0] <= 8  # two for each that is on its way: a map has one of its own


class Busy(Dataset):
    """The third item holds the worker's interpreter, when the others have been sent."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 2:
            time.sleep(0.2)
            ctypes.PyDLL(None).usleep(4_000_000)
        return torch.ones(1000)


def test_nobody_waits_for_a_worker_to_hand_over_what_it_has_read() -> None:
    """Descriptors that a thread of it sends come when that has the interpreter."""
    source = PackedDataset(Busy(), workers_setting="run.num_workers")
    loader: DataLoader = DataLoader(
        source, sampler=range(3), batch_size=None, num_workers=1, prefetch_factor=3
    )
    items = loaded_items(loader, workers_setting="run.num_workers")
    assert next(items).sum() == 1000
    time.sleep(1)
    begin = time.monotonic()
    assert next(items).sum() == 1000
    assert time.monotonic() - begin < 1.5
    assert next(items).sum() == 1000


def test_errors_and_other_values_are_packed_too() -> None:
    error = unpack(pack(DataError("row 3")))
    assert isinstance(error, DataError)
    assert str(error) == "row 3"
    assert unpack(pack(None)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_one_pinned_buffer_pins_everything() -> None:
    found = unpack(pack({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}).pin_memory())
    assert all(tensor.is_pinned() for tensor in found.values())
