"""Progress: at a terminal a bar that moves, in a log a line now and then.

for row in progress(range(num_rows), desc="reading", unit="row"): ...
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

LOG_EVERY_S = 30.0
Result = TypeVar("Result")


def progress(iterable: Iterable[Any] | None = None, *, file: TextIO | None = None, **options: Any) -> tqdm:
    """What tqdm takes and gives.  In a file, what is done within half a minute leaves no trace."""
    file = file or sys.stderr
    if _is_drawable(file):
        return tqdm(iterable, file=file, **options)
    rare = {"mininterval": LOG_EVERY_S, "maxinterval": LOG_EVERY_S, "delay": LOG_EVERY_S}
    return LogLines(iterable, file=file, **{**options, **rare})


def _is_drawable(file: TextIO) -> bool:
    """Whether it is a terminal with room for a bar; one that some program plays may say that it has no columns."""
    if not file.isatty():
        return False
    try:
        return os.get_terminal_size(file.fileno()).columns > 0
    except (OSError, ValueError):  # it cannot be asked
        return True


def by_examples(
    batches: Iterable[tuple[list[int], Result]], *, total: int, desc: str, show: bool = True
) -> Iterator[tuple[list[int], Result]]:
    """Batches of examples as they are done, with progress in examples: how many batches they make is not known."""
    with progress(total=total, desc=desc, unit="ex", leave=False, disable=not show) as bar:
        for indices, result in batches:
            bar.update(len(indices))
            yield indices, result


class LogLines(tqdm):
    """Lines, in place of one that is drawn over and over: a file would keep every copy of it."""

    _shown_s = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """A line, if the last one is old enough or all is done; an empty message would wipe a bar away."""
        now_s = time.time()  # tqdm's clock
        is_last = self.disable  # as tqdm marks the end
        if msg is None and (is_last or now_s - max(self._shown_s, self.start_t) >= self.mininterval):
            self._shown_s = now_s
            self.fp.write(f"{self}" if is_last else f"{self}\n")  # tqdm ends the last one
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing to wipe away."""
