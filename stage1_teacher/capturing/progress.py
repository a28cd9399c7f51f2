"""How far a capture is, over all ranks, and whether the disk will hold it."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from shared.cache import Claims, Row, Unit
from shared.cache.layout import SHARDS
from shared.cache.storage import LocalFolder, open_folder
from shared.errors import CacheFormatError
from shared.progress import progress

COUNTERS = ("examples", "positions", "entries", "bytes")
TEACHER_MS = "teacher_ms"


@dataclass
class Tally:
    """Counts of this rank's copy of the teacher, told to the other claimants; the first rank shows how far all are.

    Called from the writer thread and from the main one.

    ranks  that share the copy
    """

    claims: Claims
    num_examples: int
    show: bool
    ranks: int = 1
    _counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
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
            self._counts = {
                name: self._counts[name] + count for name, count in zip(COUNTERS, counts, strict=True)
            }
            self.claims.claimant.note(**self._counts, ranks=self.ranks, seconds=self._elapsed_s())
            if self.show:
                self._refresh()

    def rest(self, teacher_s: float) -> None:
        """Tells all there is to tell: there is nothing to be done at this moment.

        teacher_s  what of this copy's time was the teacher's own, of all its ranks
        """
        with self._lock:
            told = {**self._counts, TEACHER_MS: round(1e3 * teacher_s), "ranks": self.ranks}
            self.claims.claimant.tell(**told, seconds=self._elapsed_s(), idle=True)
            if self.show:
                self._refresh()

    def close(self) -> None:
        self._bar.close()

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._begin_s, 3)

    def _refresh(self) -> None:
        """Of the others only examples are known here; the rest is taken to be like ours."""
        counts, positions = self._counts, max(self._counts["positions"], 1)
        num_done = counts["examples"] + self.claims.num_examples_of_others
        per_s = num_done * counts["positions"] / max(counts["examples"], 1) / max(self._elapsed_s(), 1e-3)
        self._bar.set_postfix_str(
            f"{per_s:.0f} pos/s, {counts['entries'] / positions:.1f} entries/pos, "
            f"{counts['bytes'] / positions:.1f} B/pos",
            refresh=False,
        )
        self._bar.update(max(num_done - self._bar.n, 0))


def totals_of(told: list[dict[str, Any]]) -> dict[str, int]:
    """Sums over what claimants have told; what has another form counts nothing."""
    names = (*COUNTERS, TEACHER_MS, "ranks")
    return {name: sum(value for facts in told if isinstance(value := facts.get(name), int)) for name in names}


def require_space(location: str, unit: Unit, *, num_units_left: int) -> None:
    """Reports a full disk before it is met: the units that are left are taken to be as large as this one.

    location  of the cache; a remote one is not watched
    Raises    CacheFormatError  when they will not fit into the free space
    """
    folder = open_folder(location)
    if not isinstance(folder, LocalFolder):
        return
    sizes = [folder.size(name) or 0 for name in folder.names(f"{SHARDS}{unit.unit_id}-")]
    needed, free = max(sizes, default=0) * num_units_left, shutil.disk_usage(folder.path).free
    if needed > free:
        raise CacheFormatError(
            f"cache {location}: the {num_units_left} units that are left need about {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free. Make room and run the same command again: finished units are kept"
        )
