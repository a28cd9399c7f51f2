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
there is whole, or its name convicts it.  Processes beside the first one ``join``, and claim units from each
other by means of their own; should two do the same unit, one of the shards is dropped at the commit.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import numpy as np

from shared.cache.format import Row, ShardView, encode_shard, open_shard, sha256_hex
from shared.cache.identity import Identity
from shared.cache.index import KeyIndex, open_index, split_keys
from shared.cache.lock import LOCK_NAME, CaptureLock
from shared.cache.manifest import MANIFEST_NAME, IndexInfo, Manifest, ShardInfo, SkippedRow
from shared.cache.plan import PLAN_NAME, Plan, Unit, Wanted, make_unit
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.errors import CacheFormatError

LOG_NAME = "log.jsonl"
SHARDS = "shards/"
KNOWN_NAMES = {MANIFEST_NAME, PLAN_NAME, LOG_NAME, LOCK_NAME}


class UnitWriter:
    """The rows of one unit, published together when its ``with`` block ends without an exception."""

    def __init__(self, folder: Folder, unit: Unit, identity: Identity) -> None:
        self._folder, self._unit, self._identity = folder, unit, identity
        self._rows: dict[bytes, Row] = {}
        self._skipped: dict[bytes, SkippedRow] = {}
        self._places = set(unit.keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()

    def add(self, row: Row) -> None:
        """Takes a row, in any order.  Raises ValueError for a key of another unit, or a second time."""
        self._claim(row.key)
        self._rows[row.key] = row

    def skip(self, key: bytes, *, row: str, reason: str) -> None:
        """Leaves an example out; ``row`` names it to people, like ``train[17]``."""
        self._claim(key)
        self._skipped[key] = SkippedRow(row=row, reason=reason, key=key.hex())

    def _claim(self, key: bytes) -> None:
        if key not in self._places:
            raise ValueError(
                f"unit {self._unit.unit_id}: key {key.hex()} is not one of its keys, or came twice"
            )
        self._places.remove(key)

    def _publish(self) -> None:
        if self._places:
            raise ValueError(
                f"unit {self._unit.unit_id}: {len(self._places)} of {len(self._unit)} rows are missing"
            )
        skipped = [self._skipped[key].model_dump() for key in self._unit.keys if key in self._skipped]
        data = encode_shard(
            [self._rows[key] for key in self._unit.keys if key in self._rows],
            num_temperatures=len(self._identity.targets.temperatures),
            metadata={"unit": self._unit.unit_id, "identity": self._identity.content(), "skipped": skipped},
        )
        self._folder.publish(shard_name(self._unit.unit_id, sha256_hex(data)), data)


class CacheWriter:
    """A cache being captured, grown or repaired.  Make one with :meth:`open` or :meth:`join`."""

    def __init__(self, folder: Folder, identity: Identity, created_by: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = identity
        self.manifest = load_manifest(folder)  # the committed cache that grows, None where there is none
        self._created_by = dict(created_by)
        self._lock: CaptureLock | None = None

    @classmethod
    def open(cls, location: str, identity: Identity, *, created_by: Mapping[str, str]) -> Self:
        """Opens the cache for the one process that plans and commits; the folder may be new.

        Raises   CacheBusyError      when another capture is at work there (local folders)
                 CacheMismatchError  when what is there was captured otherwise: every difference, both sides
                 CacheFormatError    when the folder holds other things
        """
        folder = open_folder(location)
        lock = _lock_folder(folder)
        try:
            writer = cls(folder, identity, created_by)
            writer._lock = lock
            writer._check_what_is_there()
            if isinstance(folder, LocalFolder):
                folder.remove_temporaries(alive_too=lock is not None and lock.works)
            writer._remove_superseded_indices()
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return writer

    @classmethod
    def join(cls, location: str, identity: Identity) -> Self:
        """Opens the cache for one more process, which writes units of the plan that is stored there."""
        return cls(open_folder(location), identity, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back.  Finished units stay; nothing is committed."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def stored_plan(self) -> Plan | None:
        """The plan in the folder, if it is for this very identity, data included, and this manifest."""
        plan = self._read_plan()
        base = None if self.manifest is None else self.manifest.sha256
        return plan if plan is not None and plan.identity == self.identity and plan.base == base else None

    def plan(
        self,
        rows: Iterable[tuple[bytes, int]],
        *,
        examples_per_shard: int,
        skipped: Sequence[SkippedRow] = (),
    ) -> Plan:
        """Makes and stores the plan for these (key, row number) pairs, in their order.

        Equal keys are planned once, committed ones not at all.  Units that an interrupted capture with
        another plan has finished are kept, where all their examples are still wanted; other unfinished work
        is removed and noted in the log.  A committed cache's lost shards are planned again, into their old
        places.
        """
        wanted = Wanted.of(rows)
        base = None if self.manifest is None else self.manifest.sha256
        request = wanted.request(self.identity, base=base, examples_per_shard=examples_per_shard)
        old = self._read_plan()
        lost = self._lost_shards()
        if old is not None and old.request == request and not lost:
            units = list(old.units)
        else:
            units = self._cut_units(wanted, old, lost, examples_per_shard=examples_per_shard)
        plan = Plan(self.identity, tuple(units), tuple(skipped), wanted.duplicates, base, request)
        self.folder.publish(PLAN_NAME, plan.encode())
        self._discard_shards(keep={unit.unit_id for unit in units})
        return plan

    def is_finished(self, unit: Unit) -> bool:
        """Whether the unit's shard is there and whole; a damaged one is removed."""
        names = self.folder.names(f"{SHARDS}{unit.unit_id}-")
        for name in names:
            if sha256_hex(self.folder.read(name)) == _sha256_in(name):
                return True
            self.folder.remove(name)
        return False

    def unit(self, unit: Unit) -> UnitWriter:
        """The writer of one unit's shard, a context manager."""
        return UnitWriter(self.folder, unit, self.identity)

    def log(self, event: str, **facts: Any) -> None:
        """Adds a line to ``log.jsonl``: times, speeds, hosts - what the manifest must not depend on."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **facts})
        try:
            before = self.folder.read(LOG_NAME)
        except FileNotFoundError:
            before = b""
        self.folder.publish(LOG_NAME, before + line.encode() + b"\n")

    def commit(self, plan: Plan, *, settle_s: float = 0.0) -> Manifest:
        """Writes index and manifest: from here on the folder is a cache of all that was planned.

        ``settle_s``: how long to wait for the shards of other machines to show up on a network file system.
        Raises   CacheFormatError  when units are missing; the finished ones stay
        """
        names = self._shard_names(plan, settle_s=settle_s)
        shards, index, skipped = self._assemble(plan, names)
        twice = index.duplicates()
        if twice:
            raise CacheFormatError(
                f"{self.folder.where}: key {twice[0].hex()} is in two shards; capture it again."
            )
        encoded = index.encode()
        digest = sha256_hex(encoded)
        info = IndexInfo(name=f"index-{digest[:16]}.arrow", sha256=digest, bytes=encoded.size)
        manifest = Manifest.build(
            identity=self._grown_identity(),
            index=info,
            shards=shards,
            skipped=[*self._kept_skips(), *plan.skipped, *skipped],
            duplicates=plan.duplicates,
            created_by=self._created_by,
        )
        if self.manifest is None or not _same_but_for_versions(manifest, self.manifest):
            self.folder.publish(info.name, encoded)
            self.folder.publish(MANIFEST_NAME, manifest.dumps())
            self.manifest = manifest
        self.folder.remove(PLAN_NAME)
        self._discard_shards(keep=set())
        return self.manifest

    # What is there already

    def _read_plan(self) -> Plan | None:
        try:
            data = self.folder.read(PLAN_NAME)
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
        foreign = [
            name
            for name in self.folder.names("")
            if name not in KNOWN_NAMES and not name.startswith("index-")
        ]
        foreign = [name for name in foreign if not name.startswith(".")]
        if self.manifest is None and plan is None and foreign:
            raise CacheFormatError(
                f"{self.folder.where}: holds {foreign[0]!r} but no {MANIFEST_NAME}; this is no cache. Name "
                "an empty folder."
            )

    def _remove_superseded_indices(self) -> None:
        """Indices of older manifests; they outlive their commit, so that old readers can go on."""
        current = None if self.manifest is None else self.manifest.index.name
        for name in self.folder.names("index-"):
            if name != current:
                self.folder.remove(name)

    def _lost_shards(self) -> list[int]:
        """Places in the manifest of shards whose files are gone."""
        if self.manifest is None:
            return []
        there = set(self.folder.names(SHARDS))
        return [place for place, shard in enumerate(self.manifest.shards) if shard.name not in there]

    def _cut_units(
        self, wanted: Wanted, old: Plan | None, lost: list[int], *, examples_per_shard: int
    ) -> list[Unit]:
        digest = self.identity.digest()
        rows_of = dict(zip(split_keys(wanted.keys), wanted.rows.tolist(), strict=True))
        committed = self._base_index()
        units = []
        for place in lost:
            of_shard = np.flatnonzero(committed.shards == place)
            keys = split_keys(committed.keys[of_shard[np.argsort(committed.rows[of_shard])]])
            if all(key in rows_of for key in keys):
                units.append(_unit_of(digest, keys, rows_of, slot=place))
        if old is not None:
            finished = {_unit_in(name) for name in self.folder.names(SHARDS)}
            for unit in old.units:
                if (
                    unit.slot is None
                    and unit.unit_id in finished
                    and all(key in rows_of for key in unit.keys)
                ):
                    units.append(_unit_of(digest, unit.keys, rows_of))
        planned = {key for unit in units for key in unit.keys}
        taken = np.array([key in planned for key in rows_of], dtype=np.bool_)
        found = committed.find(list(rows_of))
        still_there = ~np.isin(committed.shards, lost)
        taken |= (found >= 0) & (still_there[found] if len(committed) else False)
        return units + wanted.without(taken).cut(digest, examples_per_shard=examples_per_shard)

    def _base_index(self) -> KeyIndex:
        if self.manifest is None:
            return KeyIndex.empty()
        return load_index(self.folder, self.manifest)

    def _discard_shards(self, *, keep: set[str]) -> None:
        committed = set() if self.manifest is None else {shard.name for shard in self.manifest.shards}
        stray = [n for n in self.folder.names(SHARDS) if n not in committed and _unit_in(n) not in keep]
        for name in stray:
            self.folder.remove(name)
        if stray:
            self.log("discarded", shards=stray)

    # The commit

    def _shard_names(self, plan: Plan, *, settle_s: float) -> dict[str, str]:
        deadline = time.monotonic() + settle_s
        while True:
            names = {_unit_in(name): name for name in reversed(self.folder.names(SHARDS))}
            missing = [unit for unit in plan.units if unit.unit_id not in names]
            if not missing:
                return names
            if time.monotonic() >= deadline:
                raise CacheFormatError(
                    f"{self.folder.where}: {len(missing)} of {len(plan.units)} units are not captured yet; "
                    "run the same command again."
                )
            time.sleep(min(1.0, settle_s / 10))

    def _assemble(
        self, plan: Plan, names: Mapping[str, str]
    ) -> tuple[list[ShardInfo], KeyIndex, list[SkippedRow]]:
        """The shards in order, the old ones first, their index, and what was skipped while capturing."""
        old = () if self.manifest is None else self.manifest.shards
        lost = set(self._lost_shards())
        repairs = {unit.slot: unit for unit in plan.units if unit.slot is not None}
        sources: list[ShardInfo | Unit] = []
        moved = np.full(len(old), -1, dtype=np.int32)  # old place -> new place, of shards that stay
        for place, shard in enumerate(old):
            if place in repairs:
                sources.append(repairs[place])
            elif place not in lost:
                moved[place] = len(sources)
                sources.append(shard)
        sources += [unit for unit in plan.units if unit.slot is None]
        shards, parts, skipped = [], [], []
        for place, source in enumerate(sources):
            if isinstance(source, ShardInfo):
                shards.append(source)
                continue
            name = names[source.unit_id]
            view = self._open_shard(name)
            shards.append(shard_info(name, _sha256_in(name), view))
            parts.append((place, view.keys, view.num_positions))
            skipped += [SkippedRow(**row) for row in view.metadata["skipped"]]
        return shards, _joined(self._base_index(), moved, KeyIndex.from_shards(parts)), skipped

    def _open_shard(self, name: str) -> ShardView:
        where = f"{self.folder.where}, {name}"
        if isinstance(self.folder, LocalFolder):
            return open_shard(self.folder.path / name, where=where)
        import pyarrow as pa

        return open_shard(pa.py_buffer(self.folder.read(name)), where=where)

    def _grown_identity(self) -> Identity:
        """This identity, with the data of the old manifest that are not newly listed."""
        if self.manifest is None:
            return self.identity
        mine = {(source.name, source.split) for source in self.identity.data}
        kept = [source for source in self.manifest.identity.data if (source.name, source.split) not in mine]
        return self.identity.model_copy(update={"data": (*kept, *self.identity.data)})

    def _kept_skips(self) -> Sequence[SkippedRow]:
        """Old skipped rows: kept only where this capture does not speak for all the data."""
        speaks_for_all = len(self._grown_identity().data) == len(self.identity.data)
        return () if self.manifest is None or speaks_for_all else self.manifest.skipped


def load_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a folder, checked; None where it has none."""
    try:
        data = folder.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Manifest.loads(data, where=folder.where)


def load_index(folder: Folder, manifest: Manifest) -> KeyIndex:
    """The index of a manifest, its hash checked."""
    import pyarrow as pa

    where = f"{folder.where}, {manifest.index.name}"
    data = folder.read(manifest.index.name)
    if sha256_hex(data) != manifest.index.sha256:
        raise CacheFormatError(f"{where}: sha256 {sha256_hex(data)[:12]} differs from the manifest's.")
    return open_index(pa.py_buffer(data), where=where)


def shard_name(unit_id: str, sha256: str) -> str:
    return f"{SHARDS}{unit_id}-{sha256}.arrow"


def shard_info(name: str, sha256: str, view: ShardView) -> ShardInfo:
    """A shard's entry in the manifest."""
    return ShardInfo(
        name=name,
        sha256=sha256,
        bytes=view.num_bytes,
        examples=len(view),
        positions=int(view.num_positions.sum(dtype=np.int64)),
        entries=int(view.num_entries.sum(dtype=np.int64)),
        truncated=int(view.truncated.sum()),
    )


def _unit_in(name: str) -> str:
    return name.removeprefix(SHARDS).partition("-")[0]


def _sha256_in(name: str) -> str:
    return name.removesuffix(".arrow").rpartition("-")[2]


def _unit_of(
    digest: str, keys: Sequence[bytes], rows_of: Mapping[bytes, int], *, slot: int | None = None
) -> Unit:
    rows = np.array([rows_of[key] for key in keys], dtype=np.int64)
    return make_unit(digest, keys, rows, slot=slot)


def _joined(old: KeyIndex, moved: np.ndarray, new: KeyIndex) -> KeyIndex:
    places = moved[old.shards] if len(old) else old.shards
    stays = places >= 0
    return KeyIndex(
        np.concatenate([old.keys[stays], new.keys]),
        np.concatenate([places[stays], new.shards]),
        np.concatenate([old.rows[stays], new.rows]),
        np.concatenate([old.num_positions[stays], new.num_positions]),
    ).sorted()


def _same_but_for_versions(one: Manifest, other: Manifest) -> bool:
    ignored = {"created_by", "sha256"}
    return one.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def _lock_folder(folder: Folder) -> CaptureLock | None:
    """Object stores have no locks; two captures there waste work and nothing else."""
    if not isinstance(folder, LocalFolder):
        return None
    with contextlib.suppress(FileExistsError):
        folder.path.mkdir(parents=True, exist_ok=True)
    lock = CaptureLock(folder.path)
    lock.acquire()
    return lock
