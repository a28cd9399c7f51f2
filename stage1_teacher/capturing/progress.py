"""How far a capture is, over all ranks, and whether the disk will hold it."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import Store
from tqdm import tqdm

from shared.cache import Row, Unit
from shared.errors import CacheFormatError
from shared.progress import progress

COUNTERS = ("examples", "positions", "entries", "bytes")
TEACHER_MS = "teacher_ms"  # of all ranks together


@dataclass
class Tally:
    """Counts of this run in the job's store: every rank adds, the first one shows.

    Called from the writer thread and from the main one; the store is not shared between threads elsewhere.
    """

    store: Store
    num_examples: int
    show: bool
    _bar: tqdm = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _begin_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._bar = progress(
            total=self.num_examples, desc="capture", unit="ex", disable=not self.show, mininterval=1.0
        )

    def add(self, rows: list[Row]) -> None:
        counts = (
            len(rows),
            sum(row.num_positions for row in rows),
            sum(row.num_entries for row in rows),
            sum(len(row.payload) for row in rows),
        )
        with self._lock:
            for name, count in zip(COUNTERS, counts, strict=True):
                self.store.add(name, count)
            if self.show:
                self._refresh()

    def add_teacher(self, seconds: float) -> None:
        """What of this rank's time was the teacher's own."""
        self.store.add(TEACHER_MS, round(1e3 * seconds))

    def add_unit(self) -> int:
        """Counts a published unit; returns how many all ranks have published."""
        return self.store.add("units", 1)

    def totals(self) -> dict[str, int]:
        return {name: self.store.add(name, 0) for name in (*COUNTERS, TEACHER_MS)}

    def close(self) -> dict[str, int]:
        """Ends the bar; returns the totals of all ranks."""
        with self._lock:
            totals = self.totals()
            if self.show:
                self._refresh()
            self._bar.close()
        return totals

    def _refresh(self) -> None:
        totals = self.totals()
        positions = max(totals["positions"], 1)
        elapsed_s = max(time.monotonic() - self._begin_s, 1e-9)
        self._bar.set_postfix_str(
            f"{totals['positions'] / elapsed_s:.0f} pos/s, {totals['entries'] / positions:.1f} entries/pos, "
            f"{totals['bytes'] / positions:.1f} B/pos",
            refresh=False,
        )
        self._bar.update(totals["examples"] - self._bar.n)


def require_space(location: str, unit: Unit, *, num_units_left: int) -> None:
    """Reports a full disk before it is met: the units that are left are taken to be as large as this one.

    location  of the cache; a remote one is not watched
    Raises    CacheFormatError  when they will not fit into the free space
    """
    folder = Path(location)
    sizes = [path.stat().st_size for path in folder.glob(f"shards/{unit.unit_id}-*.arrow")]
    if "://" in location or not sizes:
        return
    needed, free = sizes[0] * num_units_left, shutil.disk_usage(folder).free
    if needed > free:
        raise CacheFormatError(
            f"cache {location}: the {num_units_left} units that are left need about {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free. Make room and run the same command again: finished units are kept"
        )
