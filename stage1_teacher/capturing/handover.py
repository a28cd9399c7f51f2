"""The way from device to disk: copies that do not make the device wait, and a bounded writer thread.

The thread's death is the run's death: its error is raised by the next ``put`` or by ``close``, whichever comes
first, and nothing waits for a queue that nobody empties.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
POLL_S = 0.2


class HostCopy:
    """Tensors on their way to the host; ``wait`` returns them when they have arrived."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._tensors = {name: _to_pinned(tensor) for name, tensor in tensors.items()}
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> dict[str, Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class BackgroundWriter(Generic[Item]):
    """Hands items to ``write`` on one thread, in order, at most ``max_pending`` of them waiting.

        with BackgroundWriter(write, max_pending=4) as writer:
            writer.put(item)

    Leaving the block normally waits until all is written; leaving it by an exception drops what waits.
    """

    def __init__(self, write: Callable[[Item], None], *, max_pending: int) -> None:
        self._write = write
        self._queue: queue.Queue[Item | None] = queue.Queue(max_pending)
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        self._offer(item)

    def close(self) -> None:
        """Waits until everything is written; raises the thread's error if it had one."""
        self._offer(None)
        self._thread.join()
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandoned.set()
            self._thread.join()

    def _offer(self, item: Item | None) -> None:
        while True:
            self._raise_error()
            try:
                return self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._device is not None:  # else a thread takes the first GPU, and memory there for each rank
                torch.cuda.set_device(self._device)
            while not self._abandoned.is_set():
                try:
                    item = self._queue.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                self._write(item)
        except BaseException as error:  # raised again by the thread that puts
            self._error = error
