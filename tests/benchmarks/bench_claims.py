"""How far claims in a folder go: the real ones, by 1,024 ranks in simulated time.

    python -m tests.benchmarks.bench_claims            # the tables of docs/scaling.md

Every rank has claims of its own on one folder in memory, which counts what it is asked for.  Time is simulated: a
unit takes a time by the rank's speed, a look into the folder and a claim what is stated below.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from shared.cache import Claims, Unit
from shared.cache.layout import CLAIMS, SHARDS
from tests.benchmarks.scale import some_speeds
from tests.benchmarks.tables import Bench

NUM_RANKS = 1024
RANKS_OF_A_MACHINE = 8
UNIT_S = 10.0  # of a rank of speed one: 512 examples on an H100, docs/scaling.md
LOOK_S, CLAIM_S = 0.1, 0.01  # assumed, of a busy network file system
TIMEOUT_S = 180.0
LOOK_AGAIN_S = 20.0  # of one that finds nothing free
NEVER_S = 1e6  # of the clock of this machine, which is not that of the simulation


class CountingFolder:
    """A folder in memory."""

    where = "memory"

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {CLAIMS: {}, SHARDS: {}, "": {}}
        self.asked: Counter[str] = Counter()

    def names(self, prefix: str) -> list[str]:
        self.asked["listings"] += prefix == CLAIMS
        return list(self.files[prefix])

    def size(self, name: str) -> int | None:
        return 1

    def read(self, name: str, *, max_bytes: int = 0) -> bytes:
        self.asked["reads"] += 1
        try:
            return self._of(name)[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def publish(self, name: str, data: bytes) -> None:
        self._of(name)[name] = bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        self.asked["claims"] += 1
        if name in self._of(name):
            self.asked["claims in vain"] += 1
            return False
        self._of(name)[name] = data
        return True

    def remove(self, name: str) -> None:
        self._of(name).pop(name, None)

    def _of(self, name: str) -> dict[str, bytes]:
        return self.files[name[: name.rfind("/") + 1]]


@dataclass(frozen=True)
class Outcome:
    """Of a capture: seconds beyond the ideal in parts of it, what the folder was asked for, units done twice."""

    extra: float
    asked: Counter[str]
    per_s: float
    num_again: int


def capture(num_units: int, speeds: np.ndarray, *, num_lost: int = 0) -> Outcome:
    """By ranks of these speeds; ``num_lost`` of them die when half of the units are done."""
    folder = CountingFolder()
    units = [Unit(f"{number:016x}", (b"",), np.zeros(1, np.int64)) for number in range(num_units)]
    ranks = [Claims(folder, units, timeout_s=NEVER_S) for _ in speeds]
    ideal_s = num_units * UNIT_S / float(speeds.sum())
    events = [(0.0, rank) for rank in range(len(ranks))]
    heapq.heapify(events)
    in_hand: dict[int, Unit] = {}
    dead: set[int] = set()
    silent_from = float("inf")
    num_begun, now = 0, 0.0
    while len(folder.files[SHARDS]) < num_units:
        now, rank = heapq.heappop(events)
        if now >= silent_from:  # for the others, who cannot wait for it by this machine's clock
            for one in dead:
                ranks[one].claimant.close()
        if rank in dead:
            continue
        claims = ranks[rank]
        if (unit := in_hand.pop(rank, None)) is not None:
            folder.publish(f"{SHARDS}{unit.unit_id}-{'0' * 64}.arrow", b"")
            claims.finish(unit)
        if num_lost and not dead and len(folder.files[SHARDS]) >= num_units // 2:
            dead = set(range(num_lost))
            silent_from = now + TIMEOUT_S
        before = folder.asked.copy()
        unit = claims.next()
        spent_s = LOOK_S * (folder.asked["listings"] - before["listings"])
        spent_s += CLAIM_S * (folder.asked["claims"] - before["claims"])
        if unit is None:
            heapq.heappush(events, (now + LOOK_AGAIN_S, rank))
            continue
        in_hand[rank] = unit
        num_begun += 1
        heapq.heappush(events, (now + spent_s + UNIT_S / float(speeds[rank]), rank))
    for claims in ranks:
        claims.close()
    total = sum(folder.asked[name] for name in ("listings", "reads", "claims"))
    return Outcome(now / ideal_s - 1, folder.asked, total / now, num_begun - num_units)


def main() -> None:
    bench, rows = Bench("claims"), []
    speeds = some_speeds(NUM_RANKS)
    for units in (4, 16):
        found = capture(units * NUM_RANKS, speeds)
        in_vain = found.asked["claims in vain"] / found.asked["claims"]
        cells = [f"{units}", f"{found.extra:+.1%}", f"{found.asked['listings'] / NUM_RANKS:.1f}"]
        rows.append([*cells, f"{in_vain:.1%}", f"{found.per_s:,.0f}"])
    lost = capture(16 * NUM_RANKS, speeds, num_lost=RANKS_OF_A_MACHINE)
    notes = (
        f"A machine of {RANKS_OF_A_MACHINE} ranks is lost at half time, 16 units a rank: {lost.num_again} units "
        f"begun again, {lost.extra:+.1%}."
    )
    head = ("units a rank", "extra time", "listings a rank", "claims in vain", "asked of the folder a second")
    bench.show("claims", f"Claims of {NUM_RANKS:,} ranks in simulated time", head, rows, notes=notes)


if __name__ == "__main__":
    main()
