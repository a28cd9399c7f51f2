"""Seconds that a device works on some of what it is given, without making anybody wait for it.

    with teacher.stopwatch.running():
        hidden = body(batch)
    teacher.stopwatch.seconds()      # here, and nowhere else, the device is waited for

On a GPU the time is between two events of its stream; elsewhere by the clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up stretches; those of a GPU are read when they have passed."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._done_s = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is given to the device within counts, unless it ends in an error."""
        if not self._is_cuda:
            begin_s = time.perf_counter()
            yield
            self._done_s += time.perf_counter() - begin_s
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))
        while self._open and self._open[0][1].query():
            self._read_oldest()

    def seconds(self) -> float:
        """Of all stretches so far; waits for the device."""
        while self._open:
            self._open[0][1].synchronize()
            self._read_oldest()
        return self._done_s

    def _read_oldest(self) -> None:
        begin, end = self._open.popleft()
        self._done_s += begin.elapsed_time(end) / 1e3
