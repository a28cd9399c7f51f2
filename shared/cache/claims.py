"""Who captures which unit: claims in the cache's own folder, so that those who share the work need nothing else.

    with Claims(folder, pending, timeout_s=180) as claims:
        while True:
            while (unit := claims.next()) is not None:
                ...                                  # its shard is published
                claims.finish(unit)
            if not claims.wait(stop):                # nothing free: until there is, or all is finished
                break
        if claims.is_complete and claims.is_to_commit(stop):
            ...

Any number of processes take part, of one job or of many; each may come late, leave, or die.  A claim is a file
that one process alone can make.  It names its claimant, whose own file changes as long as that one lives.  Who finds
nothing free looks after the claims that are left, and those of the dead are claimed again.  Nothing but time depends
on it: should two capture the same unit, they write the same shard.

A claim costs one small file; the folder is listed once for several of them.
"""

from __future__ import annotations

import math
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from shared.cache.claimant import Claimant, Onlooker, is_gone, remove_empty_claims, told_by_claimants
from shared.cache.layout import (
    CLAIM_NAME,
    CLAIMANT_NAME,
    CLAIMS,
    PLAN_NAME,
    SHARD_NAME,
    SHARDS,
    claim_name,
    claimant_file,
    unit_in,
)
from shared.cache.plan import Unit
from shared.cache.storage import Folder

COMMIT = "commit"  # a task that is claimed like a unit
MAX_BATCH = 16  # claims made at a time
SHARE = 4  # of what is free, a claimant takes one part in so many for each claimant
MAX_WATCHED = 16  # claims of others
MIN_POLL_S, MAX_POLL_S, POLL_GROWTH = 0.05, 1.0, 1.3
POLL_S_PER_CLAIMANT = 0.02  # 1,024 of them look on every 20 s
PATIENCE_S = 10.0  # with counts of the others, at the end


class Claims:
    """What this process has in hand, and what it sees of the others.

    units       those without a shard, in the order of the plan
    timeout_s   after which a silent process is taken to be dead
    patience_s  for how long this one may neither claim nor wait before it is taken to hang
    facts       for the others, as of a claimant: ``job``, as ``told`` asks for it
    """

    def __init__(
        self,
        folder: Folder,
        units: Sequence[Unit],
        *,
        timeout_s: float,
        patience_s: float = 600.0,
        **facts: Any,
    ) -> None:
        self.folder = folder
        self._left = {unit.unit_id: unit for unit in units}
        self._mine: dict[str, int] = {}  # unit id, or commit -> generation of our claim
        self._claimed: deque[Unit] = deque()
        self._lock = threading.Lock()  # shards are finished on a thread of their own
        self._batch = 1
        self._num_claimants = 1
        self.num_examples_of_others = 0  # finished since the start, as far as this process has looked
        self._onlooker = Onlooker(folder, timeout_s=timeout_s)
        self.claimant = Claimant(folder, timeout_s=timeout_s, patience_s=patience_s, **facts)
        self._chance = random.Random(self.claimant.name)

    @property
    def is_complete(self) -> bool:
        """Whether every unit had its shard when this process last looked."""
        return not self._left

    @property
    def num_left(self) -> int:
        """Units without a shard, as far as this process has looked."""
        return len(self._left)

    def next(self) -> Unit | None:
        """A unit to be captured, claimed; None when none is free at this moment."""
        self.claimant.check()
        if not self._claimed:
            self._claim_some()
        return self._claimed.popleft() if self._claimed else None

    def finish(self, unit: Unit) -> None:
        """Gives the claim back: the unit's shard is there."""
        with self._lock:
            self._left.pop(unit.unit_id, None)
        self._give_back(unit.unit_id)

    def wait(self, is_stopped: Callable[[], bool]) -> bool:
        """Waits until a unit is free: True; or until all have their shards, or it is stopped: False."""
        for poll_s in self._polls(is_stopped):
            if self._claimed or self._claim_some():
                return True
            if self.is_complete:
                return False
            time.sleep(poll_s)
        return False

    def is_to_commit(self, is_stopped: Callable[[], bool]) -> bool:
        """Whether this process is to commit, now that all units have their shards; waits while another one does.

        False when another has, or when it is stopped.
        """
        for poll_s in self._polls(is_stopped):
            if self.folder.size(PLAN_NAME) is None:
                return False
            generation = self._look().get(COMMIT)
            if generation is None or self._is_abandoned(COMMIT, generation):
                made = self._make(COMMIT, 0 if generation is None else generation + 1)
                # The one before may have come to its end meanwhile: it removes the plan before its claim.
                if made and self.folder.size(PLAN_NAME) is not None:
                    return True
            time.sleep(poll_s)
        return False

    def told(self, *, job: str | None = None) -> list[dict[str, Any]]:
        """What all claimants have told, ours among them, when those at work say ``idle``; they soon do.

        job  whose claimants alone count; None: all do
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            told = [facts for facts in self.told_so_far() if job is None or facts.get("job") == job]
            at_work = [facts for facts in told if facts and not facts.get("idle") and not is_gone(facts)]
            if not at_work or time.monotonic() > deadline:
                return told
            time.sleep(MIN_POLL_S)

    def told_so_far(self) -> list[dict[str, Any]]:
        """The same, however much of it is to come."""
        return list(told_by_claimants(self.folder).values())

    def close(self) -> None:
        """Gives back what is not finished."""
        self.claimant.close()
        for task in list(self._mine):
            self._give_back(task)
        if self.folder.size(PLAN_NAME) is None:
            remove_empty_claims(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim_some(self) -> bool:
        """Claims free units, or else those of the dead; whether there were any."""
        taken = self._look()
        free = [(task, 0) for task in self._left_now() if task not in taken]
        if not free:
            free = [(task, taken[task] + 1) for task in self._abandoned(taken)]
        size = min(self._batch, math.ceil(len(free) / (SHARE * self._num_claimants)))
        for task, generation in self._from_anywhere(free):
            if self._make(task, generation):
                self._claimed.append(self._left[task])
            if len(self._claimed) == size:
                break
        self._batch = min(2 * self._batch, MAX_BATCH)
        self._drop_finished()
        return bool(self._claimed)

    def _look(self) -> dict[str, int]:
        """Tasks that are claimed, with their newest generations; forgets the units that have a shard.

        Claims are looked at before shards: a claim goes only when its shard is there.
        """
        taken: dict[str, int] = {}
        num_claimants = 0
        for name in self.folder.names(CLAIMS):
            if found := CLAIM_NAME.fullmatch(name):
                task, generation = found[1], int(found[2])
                taken[task] = max(generation, taken.get(task, 0))
            elif CLAIMANT_NAME.fullmatch(name):
                num_claimants += 1
        self._num_claimants = max(num_claimants, 1)
        with self._lock:
            for task in self._with_shards(self._left):
                if task not in self._mine:
                    self.num_examples_of_others += len(self._left.pop(task))
        return taken

    def _with_shards(self, tasks: Container[str]) -> list[str]:
        """Those of the units that have a shard; names of others, which may be many, are only glanced at."""
        names = [name for name in self.folder.names(SHARDS) if unit_in(name) in tasks]
        return list({unit_in(name) for name in names if SHARD_NAME.fullmatch(name)})

    def _drop_finished(self) -> None:
        """Of what was just claimed: a claim may have gone, with its shard there, after we had looked."""
        claimed = {unit.unit_id: unit for unit in self._claimed}
        for task in self._with_shards(claimed) if claimed else ():
            unit = claimed[task]
            self._claimed.remove(unit)
            self.num_examples_of_others += len(unit)
            self.finish(unit)

    def _left_now(self) -> list[str]:
        """Another thread finishes units meanwhile."""
        with self._lock:
            return list(self._left)

    def _abandoned(self, taken: dict[str, int]) -> list[str]:
        """Units that the dead have left, of some that this process looks after."""
        others = [task for task in self._left_now() if task in taken and task not in self._mine]
        others.sort(key=lambda task: zlib.crc32(f"{self.claimant.name} {task}".encode()))
        return [task for task in others[:MAX_WATCHED] if self._is_abandoned(task, taken[task])]

    def _is_abandoned(self, task: str, generation: int) -> bool:
        name = claim_name(task, generation)
        try:
            owner = self.folder.read(name).decode(errors="replace")
        except FileNotFoundError:  # given back
            return False
        if not CLAIMANT_NAME.fullmatch(claimant_file(owner)):  # cut by a crash
            return self._onlooker.is_silent(name, b"")
        return self._onlooker.is_dead(claimant_file(owner))

    def _from_anywhere(self, free: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
        """In order, but not from the same place as other claimants."""
        begin = self._chance.randrange(len(free)) if free and self._num_claimants > 1 else 0
        return free[begin:] + free[:begin]

    def _make(self, task: str, generation: int) -> bool:
        name, ours = claim_name(task, generation), self.claimant.name.encode()
        if not self.folder.create(name, ours) and not self._has_come_twice(name, ours):
            return False
        self._mine[task] = generation
        return True

    def _has_come_twice(self, name: str, ours: bytes) -> bool:
        """Whether a claim that is there is this one: its answer was lost, and a library had sent it once more."""
        try:
            return self.folder.read(name) == ours
        except FileNotFoundError:  # given back
            return False

    def _give_back(self, task: str) -> None:
        newest = self._mine.pop(task, -1)
        for generation in range(newest + 1):
            self.folder.remove(claim_name(task, generation))

    def _polls(self, is_stopped: Callable[[], bool]) -> Iterable[float]:
        poll_s = MIN_POLL_S
        while not is_stopped():
            self.claimant.check()
            yield poll_s
            poll_s = min(poll_s * POLL_GROWTH, max(MAX_POLL_S, POLL_S_PER_CLAIMANT * self._num_claimants))
