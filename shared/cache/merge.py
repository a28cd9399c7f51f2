"""``merge``: caches captured apart become one.

Whole shards are copied byte for byte; a shard that shares examples with an earlier one is rewritten without
them.  What the caches were captured from may differ, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext

import numpy as np
import numpy.typing as npt

from shared.cache.commit import Contents, NewShard, not_held
from shared.cache.format import sha256_hex
from shared.cache.identity import DataSource, Identity
from shared.cache.index import KeyIndex, split_keys
from shared.cache.layout import (
    MANIFEST_NAME,
    PLAN_NAME,
    foreign_names,
    require_in_no_cache,
    shard_name,
    shard_names,
    table_names,
)
from shared.cache.lock import CaptureLock
from shared.cache.manifest import Manifest, SkippedRow
from shared.cache.plan import make_unit
from shared.cache.reader import CacheReader
from shared.cache.shard import encode_shard, open_shard
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.errors import CacheFormatError


def merge(sources: Sequence[str], out: str, *, created_by: Mapping[str, str]) -> Manifest:
    """Writes a new cache of all examples of ``sources``, equal ones once; the first source wins.

    An interrupted merge is begun anew in the same folder; of one that has come to its end, nothing is done again.

    Raises   CacheMismatchError  when they were not captured alike: every difference, both sides
             CacheFormatError    when one is damaged, or ``out`` is not empty or lies in a cache
    """
    readers = [CacheReader(source) for source in sources]
    _require_alike(readers)
    folder = open_folder(out)
    if isinstance(folder, LocalFolder):
        require_in_no_cache(folder.path)
    lock = CaptureLock.in_folder(folder.path) if isinstance(folder, LocalFolder) else None
    with closing(lock) if lock is not None else nullcontext():
        if folder.size(MANIFEST_NAME) is not None and (merged := _merged(readers, out)) is not None:
            return merged
        there = [name for name in (MANIFEST_NAME, PLAN_NAME) if folder.size(name) is not None]
        there += foreign_names(folder)
        if there:
            raise CacheFormatError(
                f"{folder.where}: holds {there[0]!r} already. Name a new folder to merge into."
            )
        if lock is not None and isinstance(folder, LocalFolder):
            folder.remove_temporaries(alive_too=lock.works)  # of a merge that was killed
        return _merge(readers, folder, created_by, alone=lock is not None and lock.works)


def _merge(
    readers: Sequence[CacheReader], folder: Folder, created_by: Mapping[str, str], *, alone: bool
) -> Manifest:
    identity = _joined_identity(readers)
    new: list[NewShard] = []
    for reader in readers:
        index = KeyIndex.from_shards([one.columns for one in new])
        for place, (keys, _) in enumerate(reader.index.shard_columns()):
            rows = np.flatnonzero(index.find_array(keys) < 0)
            if len(rows):
                new.append(_copy_shard(reader, place, rows, identity, folder))
    contents = Contents.of_new(new)
    index = KeyIndex.from_shards([one.columns for one in new])
    totals = [reader.manifest.totals for reader in readers]
    manifest = Manifest.build(
        identity=identity,
        segments=contents.write_segments(folder.publish, where=folder.where),
        shards=contents.shards,
        skipped=_joined_skips(readers, index),
        duplicates=sum(total.duplicates + total.examples for total in totals) - len(index),
        created_by={**_teacher_facts(readers), **created_by},
    )
    if alone:  # else another merge may be about to name them
        _remove_others(folder, manifest)
    folder.publish(MANIFEST_NAME, manifest.dumps())
    return manifest


def _remove_others(folder: Folder, manifest: Manifest) -> None:
    """Shards, lists and indices that a killed merge of other caches has left."""
    named = {*manifest.shards.names(), *(file.name for file in manifest.files)}
    for name in {*shard_names(folder), *table_names(folder)} - named:
        folder.remove(name)


def _merged(readers: Sequence[CacheReader], out: str) -> Manifest | None:
    """The manifest of ``out`` where it holds just what these caches hold, as after a merge of them."""
    there = CacheReader(out)
    keys = np.unique(np.concatenate([reader.index.keys for reader in readers]))
    is_same = there.manifest.identity == _joined_identity(readers) and np.array_equal(
        np.sort(there.index.keys), keys
    )
    return there.manifest if is_same else None


def _require_alike(readers: Sequence[CacheReader]) -> None:
    first = readers[0].manifest.identity
    for reader in readers[1:]:
        first.compare_capture(reader.manifest.identity).require(
            where=f"merging {reader.location} into {readers[0].location}",
            remedy="Only caches captured alike can be merged.",
        )


def _copy_shard(
    reader: CacheReader, place: int, rows: npt.NDArray[np.int64], identity: Identity, folder: Folder
) -> NewShard:
    view = reader.shard(place)
    if len(rows) == len(view):
        name = reader.manifest.shards[place].name
        folder.publish(name, reader.shard_bytes(place))
        return NewShard.of(name, view)
    unit = make_unit(identity.digest(), split_keys(view.keys[rows]), rows)
    data = encode_shard(
        [view.row(row) for row in rows.tolist()],
        num_temperatures=len(identity.targets.temperatures),
        optional=identity.targets.columns,
        metadata={"unit": unit.unit_id, "identity": identity.content(), "skipped": []},
    )
    name = shard_name(unit.unit_id, sha256_hex(data))
    folder.publish(name, data)
    return NewShard.of(name, open_shard(data, where=f"{folder.where}, {name}"))


def _joined_identity(readers: Sequence[CacheReader]) -> Identity:
    data: dict[DataSource, None] = {}
    for reader in readers:
        data.update(dict.fromkeys(reader.manifest.identity.data))
    return readers[0].manifest.identity.model_copy(update={"data": tuple(data)})


def _teacher_facts(readers: Sequence[CacheReader]) -> dict[str, str]:
    """What the captures wrote of the teacher's files, whose weights are the same in all."""
    facts = [reader.manifest.created_by.items() for reader in readers]
    return {name: value for one in reversed(facts) for name, value in one if name == "teacher_content"}


def _joined_skips(readers: Sequence[CacheReader], index: KeyIndex) -> list[SkippedRow]:
    """All skipped rows, but those that another source holds."""
    skipped = list(dict.fromkeys(row for reader in readers for row in reader.manifest.skipped))
    return not_held(skipped, index)
