"""What data-loader workers send: in one piece, and with their errors as the user should see them.

    loader = DataLoader(PackedDataset(source, workers_setting="run.num_workers"), ...)
    for item in loaded_items(loader, workers_setting="run.num_workers"):    # as ``source`` made it

A worker's tensors reach its parent each through a file descriptor of its own, which costs the parent a tenth of
a millisecond a tensor; a microbatch has a dozen.  All of them go in one buffer instead.

The buffer is an anonymous file in memory (``memfd_create``), not one in ``/dev/shm``: Docker gives that 64 MB.  The
parent opens it by its name in /proc and marks it as taken, whereupon the worker closes it.  To send the descriptor,
as torch does, takes a thread of the worker: the parent waits until that has the interpreter, milliseconds for each
microbatch.  And a worker's main thread does all that can fail for want of memory or descriptors.  torch leaves it to
another thread, whose errors nobody sees: parent and worker then waited for ever.  Where there are no such files
(macOS), torch's own way is taken.

A dataset of ours returns a ``TeachonceError`` as a value instead of raising it: the loader would wrap it into a
worker's traceback and hide the row's name.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from shared.errors import TeachonceError, TrainingError

ALIGNMENT = 64  # bytes; more than any dtype asks for
SHARED_MEMORY = "/dev/shm"
FILES = "/proc"  # where open files of other processes have names
OPEN_FILE = re.compile(rf"{FILES}/\d+/fd/\d+")
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
NICENESS = 10  # of workers


class Shared:
    """Bytes as a tensor, which another process maps instead of copying them when it unpickles this.

    Once pickled, it stays open until that process has mapped it.
    """

    _on_their_way: ClassVar[list[Shared]] = []

    def __init__(self, num_bytes: int) -> None:
        """Raises   OSError  when there is not that much memory, or no more file descriptor"""
        self._descriptor: int | None = None
        self._drop_what_arrived()
        if num_bytes == 0 or not _has_files_in_memory():
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
            return
        self._descriptor = os.memfd_create("teachonce")
        # Now: a write to pages that are not there kills.  The last byte says that the others are taken.
        os.posix_fallocate(self._descriptor, 0, num_bytes + 1)
        self._map = mmap.mmap(self._descriptor, num_bytes + 1)
        self.bytes = _without_mark(self._map)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._descriptor is None:
            return _plain, (self.bytes,)
        self._on_their_way.append(self)
        return _received, (f"{FILES}/{os.getpid()}/fd/{self._descriptor}", len(self._map))

    @classmethod
    def _drop_what_arrived(cls) -> None:
        cls._on_their_way[:] = [one for one in cls._on_their_way if not one._map[-1]]


@cache
def _has_files_in_memory() -> bool:
    """And whether others can open them."""
    return hasattr(os, "memfd_create") and os.path.isdir(f"{FILES}/{os.getpid()}/fd")


def _plain(buffer: Tensor) -> Tensor:
    return buffer


def _received(path: str, num_bytes: int) -> Tensor:
    descriptor = os.open(path, os.O_RDWR)
    try:
        mapped = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    mapped[-1] = 1
    return _without_mark(mapped)


def _without_mark(mapped: mmap.mmap) -> Tensor:
    return torch.frombuffer(mapped, dtype=torch.uint8)[:-1]


@dataclass(frozen=True)
class Packed:
    """A value whose tensors lie in one buffer.

    pickled  the value, with a number in the place of each tensor
    places   (offset in the buffer, dtype, shape) of each tensor
    buffer   where it was packed; bytes where it was received
    """

    pickled: bytes
    places: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]
    buffer: Shared | Tensor

    @property
    def bytes(self) -> Tensor:
        return self.buffer.bytes if isinstance(self.buffer, Shared) else self.buffer

    def pin_memory(self) -> Packed:
        return replace(self, buffer=self.bytes.pin_memory())


@dataclass(frozen=True)
class Sent:
    """A packed value on its way between processes: bytes, which a loader cannot fail to pass on."""

    pickled: bytes

    @classmethod
    def of(cls, value: Packed | TeachonceError) -> Sent:
        return cls(bytes(ForkingPickler.dumps(value)))

    def received(self) -> Any:
        return pickle.loads(self.pickled)

    def pin_memory(self) -> Any:
        """Called by the loader's own thread, where pages are to be pinned."""
        value = self.received()
        return value.pin_memory() if isinstance(value, Packed) else value


def pack(value: Any) -> Packed:
    """Copies the tensors of any value that pickles; they must lie on the CPU.

    Raises   OSError  when memory for them cannot be had
    """
    tensors: list[Tensor] = []
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.persistent_id = lambda part: _number(part, tensors)  # type: ignore[method-assign]
    pickler.dump(value)
    places, offset = [], 0
    for tensor in tensors:
        places.append((offset, tensor.dtype, tuple(tensor.shape)))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = Shared(offset)
    for tensor, place in zip(tensors, places, strict=True):
        _view(buffer.bytes, place).copy_(tensor)
    return Packed(stream.getvalue(), tuple(places), buffer)


def unpack(packed: Packed) -> Any:
    """The value again; its tensors are views of the buffer."""
    unpickler = pickle.Unpickler(io.BytesIO(packed.pickled))
    unpickler.persistent_load = lambda number: _view(packed.bytes, packed.places[number])  # type: ignore[method-assign]
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
    """Packs the items of a dataset, in the worker that has made them.

    workers_setting  the recipe's key for the number of workers, named when their memory does not suffice
    """

    def __init__(self, source: Dataset, *, workers_setting: str) -> None:
        self.source = source
        self.workers_setting = workers_setting

    def __getitem__(self, index: Any) -> Sent:
        value = self.source[index]
        try:
            return Sent.of(pack(value))
        except OSError as error:
            return Sent.of(_cannot_hand_over(error, self.workers_setting))


def _cannot_hand_over(error: OSError, workers_setting: str) -> TrainingError:
    if error.errno in OUT_OF_DESCRIPTORS:
        return _without_descriptors(workers_setting)
    return TrainingError(
        f"a data-loader worker cannot hand over what it has read ({error.strerror or error}). Lower "
        f"{workers_setting} (0: no workers), or give the job more memory"
    )


def _without_descriptors(workers_setting: str) -> TrainingError:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return TrainingError(
        f"a process that loads data is out of file descriptors (too many open files; the limit is {limit}). Raise it "
        f"(ulimit -n 4096), or lower {workers_setting} (0: no workers)"
    )


def begin_worker(worker: int) -> None:
    """``worker_init_fn`` of every loader: a worker makes way for its parent, and signals to the parent's group do not
    reach it.

    torchrun signals whole groups, and so does a terminal; a worker that died of it took its trainer along before that
    had saved.  To ignore SIGTERM instead is no cure: the interpreter ends its children by it, and then waits for them
    for ever.  So a worker also forgets what its parent does about signals.

    A worker ends with its parent.  torch looks who is the parent when the worker begins its work: one whose parent
    had been killed by then would stay for ever.

    Where cores are few, all ranks wait for the one that waits for a worker to leave its core: with two ranks on two
    cores a step of a small model took 0.43 s, and 0.24 s where workers are nice.
    """
    os.setpgid(0, 0)
    os.nice(NICENESS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a process of its own"
    parent.join()
    os._exit(1)


def loaded_items(loader: DataLoader, *, workers_setting: str) -> Iterator[Any]:
    """The items in order, as the dataset made them; packed ones are unpacked.

    workers_setting  the recipe's key for the number of workers, named when one of them dies
    Raises   TeachonceError  one that came as a value
             TrainingError   when workers cannot be started, or one of them died
    """
    loaded = _started(loader, workers_setting)
    while True:
        try:
            item = next(loaded)
            if isinstance(item, Sent):
                item = item.received()
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if _lacks_descriptors(error):
                raise _without_descriptors(workers_setting) from error
            if isinstance(error, PermissionError) and _is_of_the_handover(error):
                raise TrainingError(
                    f"what a data-loader worker has read cannot be opened: {_first_line(error)}. This process may "
                    f"not open its workers' files in {FILES}. Do without workers ({workers_setting}=0)"
                ) from error
            if not _says_that_a_worker_died(error):
                raise
            why = (
                "before its parent took what it had read"
                if _is_of_the_handover(error)
                else _first_line(error)
            )
            raise TrainingError(
                f"a data-loader worker died: {why}. Often the host's memory did not suffice; lower {workers_setting}"
            ) from error
        if isinstance(item, Packed):
            item = unpack(item)
        if isinstance(item, TeachonceError):
            raise item
        yield item


def _started(loader: DataLoader, workers_setting: str) -> Iterator[Any]:
    """The loader's iterator, which says where it is asked that a worker has died.

    torch would raise that out of a signal handler as well, in the middle of whatever the main thread does: a step
    that the other ranks go on with, or a checkpoint.
    """
    # One whose making fails has not got so far as to say so, and would print a traceback when it is collected.
    _MultiProcessingDataLoaderIter._shutdown = True
    try:
        answer = signal.getsignal(signal.SIGCHLD)
        loaded = iter(loader)
        if loader.num_workers and _is_of_torch(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_of_torch(answer) else answer)
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise _without_descriptors(workers_setting) from error
        raise TrainingError(
            f"data-loader workers cannot be started ({error}). Their semaphores are files in {SHARED_MEMORY}, which "
            f"{_room()}. Give it some room (docker run --shm-size=1g), or do without workers ({workers_setting}=0)"
        ) from error
    return loaded


def _is_of_torch(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("torch.utils.data")


def _room() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return f"has {usage.total / 2**20:.3g} MiB, {usage.free / 2**20:.3g} of them free"


def _lacks_descriptors(error: Exception) -> bool:
    """This process; its thread that pins keeps the number in the text alone."""
    numbers = {f"[Errno {number}]" for number in OUT_OF_DESCRIPTORS}
    is_of_pinning = "in pin memory thread" in str(error) and any(one in str(error) for one in numbers)
    return is_of_pinning or getattr(error, "errno", None) in OUT_OF_DESCRIPTORS


def _is_of_the_handover(error: Exception) -> bool:
    """Whether it says that a worker's file could not be opened."""
    text = str(error)
    is_of_the_data = "in DataLoader worker" in text
    return isinstance(error, OSError) and OPEN_FILE.search(text) is not None and not is_of_the_data


def _says_that_a_worker_died(error: Exception) -> bool:
    """The loader's own words, or that its file went with the worker; not what the dataset's code raised there."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and _is_of_the_handover(error):
        return True
    return "Caught " not in text and (isinstance(error, EOFError) or "DataLoader worker" in text)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
