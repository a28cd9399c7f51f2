"""Writing a cache: units in any order, by any number of processes, and one commit.

    with CacheWriter.open(path, identity, created_by=versions) as writer:
        plan = writer.stored_plan() or writer.plan(keys_and_rows, examples_per_shard=512)
        for unit in plan.units:
            if not writer.is_finished(unit):
                with writer.unit(unit) as shard:
                    for ...: shard.add(row)
        manifest = writer.commit(plan)

A unit is in memory until its ``with`` block ends without an exception; then its shard appears under a name
made of the unit's id and of its own hash.  So there is nothing to repair after a crash: a shard that is
there is whole, or its name convicts it.  Processes beside the first one ``join``, and share the units by ``Claims``;
should two do the same unit, one of the shards is dropped at the commit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import pyarrow as pa

from shared.cache.commit import (
    Contents,
    NewShard,
    all_skips,
    grown_identity,
    require_few_skipped,
    require_places,
)
from shared.cache.format import as_buffer, sha256_hex
from shared.cache.identity import Identity
from shared.cache.index import CacheIndex
from shared.cache.layout import (
    CLAIMS,
    LOG_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    require_no_other_files,
    sha256_in,
    shard_names,
    table_names,
    unit_in,
)
from shared.cache.lock import CaptureLock, never
from shared.cache.log import MAX_LOG_BYTES
from shared.cache.manifest import Manifest, SkippedRow, load_manifest
from shared.cache.mending import mend_tables
from shared.cache.plan import MAX_PLAN_BYTES, Plan, Unit
from shared.cache.planning import Wanted, cut_units
from shared.cache.segments import FileInfo, open_shards, read_file
from shared.cache.shard import open_shard, view_shard
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.cache.unit import UnitWriter
from shared.cache.verified import VerifiedFiles
from shared.errors import CacheFormatError


class CacheWriter:
    """A cache being captured, grown or repaired.  Make one with :meth:`open` or :meth:`join`."""

    def __init__(self, folder: Folder, identity: Identity, created_by: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = identity
        self.manifest = load_manifest(folder)  # the committed cache that grows, None where there is none
        self._created_by = dict(created_by)
        self._lock: CaptureLock | None = None
        self._verified = VerifiedFiles()
        self._index: CacheIndex | None = None
        self._committed: list[str] | None = None
        self._found: dict[str, list[str]] | None = (
            None  # unit id -> shards, at the first look and by our hand
        )

    @classmethod
    def open(
        cls,
        location: str,
        identity: Identity,
        *,
        created_by: Mapping[str, str],
        for_a_moment: bool = False,
        is_stopped: Callable[[], bool] = never,
    ) -> Self:
        """Opens the cache for a process that plans, or commits; the folder may be new.

        for_a_moment  until a near :meth:`close`, for which others wait
        is_stopped    asked while it waits for those

        Raises   CacheBusyError      when another capture is at work there (local folders); WaitStoppedError, which
                                     is one, when the wait was stopped
                 CacheMismatchError  when what is there was captured otherwise: every difference, both sides
                 CacheFormatError    when the folder holds other things, or lists and indices are lost together with
                                     shards
        """
        folder = open_folder(location)
        lock = (
            CaptureLock.in_folder(folder.path, for_a_moment=for_a_moment, is_stopped=is_stopped)
            if isinstance(folder, LocalFolder)
            else None
        )
        try:
            writer = cls(folder, identity, created_by)
            writer._lock = lock
            writer._check_what_is_there()
            writer._mend_tables()
            writer._sweep()
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return writer

    @classmethod
    def join(cls, location: str, identity: Identity, *, created_by: Mapping[str, str] | None = None) -> Self:
        """Opens the cache for one more process, which writes units of the plan that is stored there."""
        return cls(open_folder(location), identity, created_by or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back.  Finished units stay; nothing is committed."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextmanager
    def locked(self, is_stopped: Callable[[], bool] = never) -> Iterator[None]:
        """The folder is this process's alone for a moment: for the commit, where others take part.

        Raises   as :meth:`open`, of the lock
        """
        if self._lock is None and isinstance(self.folder, LocalFolder):
            self._lock = CaptureLock.in_folder(self.folder.path, for_a_moment=True, is_stopped=is_stopped)
        try:
            yield
        finally:
            self.close()

    def stored_plan(self) -> Plan | None:
        """The plan in the folder, if it is for this very identity, data included, and this manifest."""
        plan, there = self._read_plan(), shard_names(self.folder)
        if plan is None or plan.identity != self.identity or plan.base != self._base:
            return None
        if not set(self._missing_shards(there)) <= set(plan.lost):
            return None
        self._look(there)
        return plan

    def plan(
        self,
        wanted: Wanted | Iterable[tuple[bytes, int]],
        *,
        examples_per_shard: int,
        skipped: Sequence[SkippedRow] = (),
    ) -> Plan:
        """Makes and stores the plan for what is wanted, or for (key, row number) pairs, in their order.

        Equal keys are planned once, committed ones not at all.  Units that an interrupted capture with
        another plan has finished are kept where all their examples are still wanted; its other shards are
        removed, which the log notes.  A committed cache's lost shards are planned again, into their old
        places; where that is all there is to do, what the cache leaves out otherwise is not tried again.
        """
        wanted = wanted if isinstance(wanted, Wanted) else Wanted.of_pairs(wanted)
        old, there = self._read_plan(), shard_names(self.folder)
        lost = self._lost_shards(old, there)
        digest = self.identity.digest()
        request = wanted.request(digest, base=self._base, lost=lost, examples_per_shard=examples_per_shard)
        before = {} if self.manifest is None else {row.key: row for row in self.manifest.skipped if row.key}
        refused = [bytes.fromhex(key) for key in before]
        if old is not None and old.request == request:
            units = old.units
        else:
            finished = set() if old is None else {unit_in(name) for name in there}
            kept = [] if old is None else [unit for unit in old.units if unit.unit_id in finished]
            cut = cut_units(
                wanted,
                identity_digest=digest,
                committed=self._base_index(),
                lost={place: unit_in(self._committed_names()[place]) for place in lost},
                refused=refused,
                kept=kept,
                examples_per_shard=examples_per_shard,
            )
            units = tuple(cut)
        held = [] if self.manifest is None else self.manifest.shards.column("examples").tolist()
        require_places([*held, *map(len, units)], where=self.folder.where)
        planned = {key for unit in units for key in unit.keys} if lost else set()
        stays = [  # refused, and not tried again
            before[key.hex()]
            for key, place in zip(refused, wanted.find(refused).tolist(), strict=True)
            if lost and place >= 0 and key not in planned
        ]
        plan = Plan(self.identity, units, (*skipped, *stays), wanted.duplicates, self._base, request, lost)
        self.folder.publish(PLAN_NAME, plan.encode())
        replaced = () if old is None else old.units
        ours = {unit.unit_id for unit in units}
        self._discard_shards(there, replaced, keep=ours)
        self._look([name for name in there if unit_in(name) in ours])
        return plan

    def is_finished(self, unit: Unit) -> bool:
        """Whether the unit's shard was there when the plan was read or made, and is whole; a damaged one is removed.

        Of what other processes finish later it knows nothing.
        """
        return self.num_skipped(unit) is not None

    def num_skipped(self, unit: Unit) -> int | None:
        """How many examples the shard of a finished unit leaves out; None where it is not finished."""
        found = self._look(shard_names(self.folder)) if self._found is None else self._found
        for name in list(found.get(unit.unit_id, ())):
            try:
                data = self.folder.read(name)
                if sha256_hex(data) == sha256_in(name):
                    return len(open_shard(data, where=f"{self.folder.where}, {name}").metadata["skipped"])
            except FileNotFoundError:
                pass
            found[unit.unit_id].remove(name)
            self.folder.remove(name)
        return None

    def unit(self, unit: Unit) -> UnitWriter:
        """The writer of one unit's shard, a context manager."""
        return UnitWriter(self.folder, unit, self.identity, on_published=self._note)

    def log(self, event: str, **facts: Any) -> None:
        """Adds a line to ``log.jsonl``: times, speeds, hosts - what the manifest must not depend on."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **facts})
        self.folder.append(LOG_NAME, line.encode(), max_bytes=MAX_LOG_BYTES)

    def commit(self, plan: Plan, *, settle_s: float = 0.0, max_skipped: int | None = None) -> Manifest:
        """Writes lists, indices and manifest: from here on the folder is a cache of all that was planned.

        Segments that did not change are named as they are: what is written depends on what is new.

        A plan that was committed already, by a process that was killed before it removed the plan or was taken to be
        dead, is not committed again.

        ``settle_s``: how long to wait for the shards of other machines to show up on a network file system.
        Raises   CacheFormatError  when units are missing, or another plan was stored or committed meanwhile; the
                                   finished ones stay
                 DataError         when the plan and its shards leave out more rows than ``max_skipped``
        """
        is_stored, current = self._is_stored(plan), load_manifest(self.folder)
        has_moved = plan.base != (None if current is None else current.sha256)
        if current is not None and has_moved and has_shards_of(current, plan):
            self.manifest, self._index, self._committed = current, None, None
            if is_stored:
                self._remove_plan(plan)
            return current
        if has_moved or not is_stored:
            raise self._has_changed()
        there, names = self._shards_of_units(plan, settle_s=settle_s)
        if plan.base != self._base or not set(self._missing_shards(there)) <= set(plan.lost):
            raise self._has_changed()
        new = [self._new_shard(names[unit.unit_id]) for unit in plan.units]
        skipped = [row for shard in new for row in shard.skipped]
        if max_skipped is not None:
            require_few_skipped(
                len(plan.skipped) + len(skipped), max_skipped=max_skipped, where=self.folder.where
            )
        contents = Contents.of_plan(plan, self.manifest, self._base_index(), new)
        identity = grown_identity(self.manifest, self.identity)
        skipped = all_skips(contents, self.identity, [*plan.skipped, *skipped])
        created_by = {**(self.manifest.created_by if self.manifest else {}), **self._created_by}
        if self.manifest is None or not self.manifest.says(
            contents.shards,
            identity=identity,
            skipped=skipped,
            duplicates=plan.duplicates,
            created_by=created_by,
        ):
            manifest = Manifest.build(
                identity=identity,
                segments=contents.write_segments(self.folder.publish, where=self.folder.where),
                shards=contents.shards,
                skipped=skipped,
                duplicates=plan.duplicates,
                created_by=created_by,
            )
            self._require_files(manifest)
            self.folder.publish(MANIFEST_NAME, manifest.dumps())
            self.manifest, self._index, self._committed = manifest, None, None
        self._remove_plan(plan)
        return self.manifest

    def require_committed(self, plan: Plan, *, settle_s: float = 0.0) -> None:
        """By whichever process.

        settle_s  how long to wait for the manifest of another machine to show up on a network file system
        Raises   CacheFormatError  unless the manifest that is there has a shard of each of the plan's units
        """
        deadline = time.monotonic() + settle_s
        while (manifest := load_manifest(self.folder)) is None or not has_shards_of(manifest, plan):
            if time.monotonic() >= deadline:
                raise self._has_changed()
            time.sleep(min(1.0, settle_s / 10))

    def _is_stored(self, plan: Plan) -> bool:
        stored = self._read_plan()
        return stored is not None and stored.request == plan.request

    def _remove_plan(self, plan: Plan) -> None:
        """After its commit, with what else it has left."""
        self.folder.remove(PLAN_NAME)
        self._discard_shards(shard_names(self.folder), plan.units, keep=set())
        if isinstance(self.folder, LocalFolder):
            self.folder.remove_temporaries(alive_too=False)  # of those that died meanwhile

    @property
    def _base(self) -> str | None:
        return None if self.manifest is None else self.manifest.sha256

    def _base_index(self) -> CacheIndex:
        if self._index is None:
            self._index = (
                CacheIndex.of([])
                if self.manifest is None
                else CacheIndex.open(self.manifest, self._read_table, where=self.folder.where)
            )
        return self._index

    def _read_table(self, file: FileInfo) -> pa.Buffer:
        """A list or an index; a local one is mapped, and hashed once a day."""
        if not isinstance(self.folder, LocalFolder):
            return read_file(self.folder, file)
        path, where = self.folder.path / file.name, f"{self.folder.where}, {file.name}"
        try:
            self._verified.require(path, file.sha256, where=where)
            return as_buffer(path)
        except FileNotFoundError as error:
            raise CacheFormatError(f"{where}: is missing") from error

    def _read_plan(self) -> Plan | None:
        try:
            data = self.folder.read(PLAN_NAME, max_bytes=MAX_PLAN_BYTES)
        except FileNotFoundError:
            return None
        return Plan.decode(data, where=f"{self.folder.where}, {PLAN_NAME}")

    def _check_what_is_there(self) -> None:
        plan = self._read_plan()
        remedy = "Capture into another folder, or delete this one."
        if self.manifest is not None:
            self.manifest.identity.compare_capture(self.identity).require(
                where=self.folder.where, remedy=remedy
            )
        if plan is not None:
            where = f"{self.folder.where} (unfinished)"
            plan.identity.compare_capture(self.identity).require(where=where, remedy=remedy)
        if self.manifest is None and plan is None:
            require_no_other_files(self.folder)

    def _mend_tables(self) -> None:
        """Makes lost or damaged lists and indices again, without which nothing says what the cache already holds."""
        if self.manifest is None:
            return
        try:
            if self.manifest.format_version > 1:
                self.manifest.with_shards(open_shards(self.manifest.segments, self._read_table))
            self._base_index()
        except CacheFormatError:
            faults = mend_tables(self.folder, self.manifest, partial(read_file, self.folder))
            self.manifest = load_manifest(self.folder)
            self._committed = None
            for fault in faults:
                self.log("index made again", reason=fault)

    def _sweep(self) -> None:
        """Removes what killed processes left half-written, and lists and indices of older manifests.

        Those outlive their commit, so that a reader of the old cache can go on.  Where nothing locks, and others
        take part in a capture, one of them may be about to name what looks old.
        """
        is_locked, is_shared = self._lock is not None and self._lock.works, bool(self.folder.names(CLAIMS))
        if isinstance(self.folder, LocalFolder):
            self.folder.remove_temporaries(alive_too=is_locked and not is_shared)
        if is_shared and not is_locked:
            return
        current = set() if self.manifest is None else {file.name for file in self.manifest.files}
        for name in table_names(self.folder):
            if name not in current:
                self.folder.remove(name)

    def _require_files(self, manifest: Manifest) -> None:
        """What the manifest names must be there: where nothing locks, another capture may have cleared it away."""
        if any(self.folder.size(file.name) != file.bytes for file in manifest.files):
            raise self._has_changed()

    def _has_changed(self) -> CacheFormatError:
        return CacheFormatError(
            f"{self.folder.where}: changed since it was planned; run the same command again."
        )

    def _committed_names(self) -> list[str]:
        """The shards that the manifest has, in order."""
        if self._committed is None:
            self._committed = [] if self.manifest is None else self.manifest.shards.names()
        return self._committed

    def _missing_shards(self, there: Sequence[str]) -> list[int]:
        """Places in the manifest of shards whose files are gone; ``there``: the shards that lie in the folder."""
        found = set(there)
        return [place for place, name in enumerate(self._committed_names()) if name not in found]

    def _lost_shards(self, old: Plan | None, there: Sequence[str]) -> tuple[int, ...]:
        """The missing shards, and those that an interrupted plan already began to replace."""
        begun = old.lost if old is not None and old.base == self._base else ()
        return tuple(sorted({*self._missing_shards(there), *begun}))

    def _discard_shards(self, there: Sequence[str], units: Sequence[Unit], *, keep: set[str]) -> None:
        """Removes shards that are in no manifest: all of them, or those of ``units`` where nothing says that
        we are alone.
        """
        alone = self._lock is not None and self._lock.works
        ours = {unit.unit_id for unit in units}
        stray = [
            name
            for name in sorted(set(there).difference(self._committed_names()))
            if unit_in(name) not in keep and (alone or unit_in(name) in ours)
        ]
        for name in stray:
            self.folder.remove(name)
        if stray:
            self.log("discarded", shards=stray)

    def _shards_of_units(self, plan: Plan, *, settle_s: float) -> tuple[list[str], dict[str, str]]:
        """The shards that lie in the folder, and by unit id that of each of the plan's."""
        deadline = time.monotonic() + settle_s
        ours = {unit.unit_id for unit in plan.units}
        while True:
            there = shard_names(self.folder)
            names = {unit: name for name in reversed(there) if (unit := unit_in(name)) in ours}
            if len(names) == len(ours):
                return there, names
            if time.monotonic() >= deadline:
                raise CacheFormatError(
                    f"{self.folder.where}: {len(ours) - len(names)} of {len(plan.units)} units are not captured yet; "
                    "run the same command again."
                )
            time.sleep(min(1.0, settle_s / 10))

    def _new_shard(self, name: str) -> NewShard:
        return NewShard.of(name, view_shard(self.folder, name, where=f"{self.folder.where}, {name}"))

    def _look(self, there: Sequence[str]) -> dict[str, list[str]]:
        self._found = {}
        for name in there:
            self._note(name)
        return self._found

    def _note(self, name: str) -> None:
        if self._found is not None:
            self._found.setdefault(unit_in(name), []).append(name)


def has_shards_of(manifest: Manifest, plan: Plan) -> bool:
    """Whether each of the plan's units has one: their ids say what is captured, and of which keys."""
    return {unit.unit_id for unit in plan.units} <= {unit_in(name) for name in manifest.shards.names()}
