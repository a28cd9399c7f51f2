"""What data-loader workers send: in one piece, and with their errors as the user should see them.

    loader = DataLoader(PackedDataset(source), ...)
    for item in loaded_items(loader, workers_setting="run.num_workers"):    # as ``source`` made it

A worker's tensors reach its parent each through a file descriptor of its own, which costs the parent a tenth of
a millisecond a tensor; a microbatch has a dozen.  All of them go in one buffer instead.

A dataset of ours returns a ``TeachonceError`` as a value instead of raising it: the loader would wrap it into a
worker's traceback and hide the row's name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import TeachonceError, TrainingError

ALIGNMENT = 64  # bytes; more than any dtype asks for


@dataclass(frozen=True)
class Packed:
    """A value whose tensors lie in one buffer.

    pickled  the value, with a number in the place of each tensor
    places   (offset in the buffer, dtype, shape) of each tensor
    """

    pickled: bytes
    places: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]
    buffer: Tensor

    def pin_memory(self) -> Packed:
        """Called by the loader's own thread, where pages are to be pinned."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(value: Any) -> Packed:
    """Copies the tensors of any value that pickles; they must lie on the CPU."""
    tensors: list[Tensor] = []
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.persistent_id = lambda part: _number(part, tensors)  # type: ignore[method-assign]
    pickler.dump(value)
    places, offset = [], 0
    for tensor in tensors:
        places.append((offset, tensor.dtype, tuple(tensor.shape)))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(offset, dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        _view(buffer, place).copy_(tensor)
    return Packed(stream.getvalue(), tuple(places), buffer)


def unpack(packed: Packed) -> Any:
    """The value again; its tensors are views of the buffer."""
    unpickler = pickle.Unpickler(io.BytesIO(packed.pickled))
    unpickler.persistent_load = lambda number: _view(packed.buffer, packed.places[number])  # type: ignore[method-assign]
    return unpickler.load()


def _number(part: Any, tensors: list[Tensor]) -> int | None:
    if not isinstance(part, Tensor):
        return None
    tensors.append(part)
    return len(tensors) - 1


def _view(buffer: Tensor, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
    offset, dtype, shape = place
    num_bytes = math.prod(shape) * dtype.itemsize
    return buffer[offset : offset + num_bytes].view(dtype).view(shape)


class PackedDataset(Dataset):
    """Packs the items of a dataset, in the worker that has made them."""

    def __init__(self, source: Dataset) -> None:
        self.source = source

    def __getitem__(self, index: Any) -> Packed:
        return pack(self.source[index])


def leave_process_group(worker: int) -> None:
    """``worker_init_fn`` of every loader: signals to the parent's process group do not reach the worker.

    torchrun signals whole groups, and a worker that died of SIGTERM took its trainer along before that had saved.
    To ignore SIGTERM instead is no cure: the interpreter ends its children by it, and then waits for them for ever.
    """
    os.setpgid(0, 0)


def loaded_items(loader: DataLoader, *, workers_setting: str) -> Iterator[Any]:
    """The items in order, as the dataset made them; packed ones are unpacked.

    workers_setting  the recipe's key for the number of workers, named when one of them dies
    Raises   TeachonceError  one that came as a value
             TrainingError   when a worker process died
    """
    loaded = iter(loader)
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _says_that_a_worker_died(error):
                raise
            raise TrainingError(
                f"a data-loader worker died: {_first_line(error)}. Often the host's memory did not "
                f"suffice; lower {workers_setting}"
            ) from error
        if isinstance(item, Packed):
            item = unpack(item)
        if isinstance(item, TeachonceError):
            raise item
        yield item


def _says_that_a_worker_died(error: Exception) -> bool:
    """The loader's own words, or the connection that broke while a dead worker's tensors were fetched.

    An exception of the dataset's code has the worker's traceback in its text.
    """
    if "Caught " in str(error):
        return False
    return isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
