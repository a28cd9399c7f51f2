"""Lists and indices that are lost or damaged, made again from what is whole; no example is captured for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import combinations, islice, permutations

import pyarrow as pa

from shared.cache.commit import NewShard
from shared.cache.format import sha256_hex
from shared.cache.index import KeyIndex, open_index
from shared.cache.layout import MANIFEST_NAME, sha256_in, shard_names
from shared.cache.manifest import Manifest
from shared.cache.segments import FileInfo, Segment, open_segment_list
from shared.cache.shard import open_shard
from shared.cache.shard_list import ShardInfo, ShardList
from shared.cache.storage import Folder
from shared.errors import CacheFormatError

REMEDY = (
    f"Delete {MANIFEST_NAME} and run teacher-cache again: it keeps the whole shards that its new plan has."
)
MAX_TRIES = 4096  # of places of shards without rows
Read = Callable[[FileInfo], pa.Buffer]


def mend_tables(folder: Folder, manifest: Manifest, read: Read) -> list[str]:
    """Makes again each list and index that ``read`` refuses; returns what was wrong with them.

    A list comes from the shards and from the index, which knows their order; an index from the shards.

    Raises   CacheFormatError  when shards are lost too, or the bytes come out otherwise than the manifest says
    """
    faults: list[str] = []
    lost: list[Segment] = []
    known: set[str] = set()  # shards of lists that are whole
    for segment, first in zip(manifest.segments, manifest.first_places, strict=True):
        try:
            shards = manifest.shards if segment.list is None else open_segment_list(segment, read)
        except CacheFormatError as error:
            faults.append(str(error))
            lost.append(segment)
            continue
        known.update(shards.names())
        try:
            open_index(read(segment.index), shard_sizes=shards.column("examples"), where=segment.index.name)
        except CacheFormatError as error:
            faults.append(str(error))
            names = enumerate(shards.names(), first)
            index = KeyIndex.from_shards([_whole(folder, name, place).columns for place, name in names])
            _publish(folder, segment.index, index.encode())
    for segment in lost:
        strays = [name for name in shard_names(folder) if name not in known]
        assert segment.list is not None
        filled, empty = _in_order_of_index(folder, segment, strays, read)
        _publish(folder, segment.list, _list_like(segment, filled, empty))
    return faults


def _in_order_of_index(
    folder: Folder, segment: Segment, names: list[str], read: Read
) -> tuple[list[ShardInfo], list[ShardInfo]]:
    """Those of the shards that the segment's index holds, as far as they are whole; and those without rows."""
    assert segment.list is not None
    where = f"{folder.where}, {segment.index.name}"
    try:
        index = open_index(read(segment.index), shard_sizes=[segment.examples], where=where)
    except CacheFormatError as error:
        raise CacheFormatError(
            f"{where}: is missing or damaged, and so is {segment.list.name}, the list of its shards. {REMEDY}"
        ) from error
    found, empty = [], []
    for name in names:
        with suppress(CacheFormatError):  # if it was one of the list, the list comes out otherwise
            shard = _whole(folder, name)
            row = index.find_array(shard.columns[0][:1])
            if not len(row):
                empty.append(shard.info)
            elif row[0] >= 0:
                found.append((int(index.places[row[0]]), shard.info))
    return [info for _, info in sorted(found, key=lambda pair: pair[0])], empty


def _list_like(segment: Segment, filled: Sequence[ShardInfo], empty: Sequence[ShardInfo]) -> pa.Buffer:
    """The segment's list of these shards, those without rows where its hash says: no index knows their places.

    They are tried at the end first, where a repeated capture puts them.  Another list where none has the hash.
    """
    assert segment.list is not None
    num_empty = max(0, segment.shards - len(filled))
    places = combinations(reversed(range(segment.shards)), num_empty)
    tries = ((at, some) for at in places for some in permutations(empty, num_empty))
    for at, some in islice(tries, MAX_TRIES):
        infos = iter(filled)
        by_place = dict(zip(at, some, strict=True))
        order = (by_place[place] if place in by_place else next(infos) for place in range(segment.shards))
        data = ShardList.of(order).encode()
        if sha256_hex(data) == segment.list.sha256:
            return data
    return ShardList.of(filled).encode()


def _whole(folder: Folder, name: str, place: int | None = None) -> NewShard:
    """Raises   CacheFormatError  for a shard that is missing or damaged"""
    where = f"{folder.where}, {name}" if place is None else f"{folder.where}, shard {place:05d} ({name})"
    try:
        data = folder.read(name)
    except FileNotFoundError:
        data = b""
    if sha256_hex(data) != sha256_in(name):
        raise CacheFormatError(
            f"{where}: is missing or damaged, and so is the index of its segment. {REMEDY}"
        )
    return NewShard.of(name, open_shard(data, where=where))


def _publish(folder: Folder, file: FileInfo, data: pa.Buffer) -> None:
    found = sha256_hex(data)
    if found != file.sha256:  # another release of Arrow may spell the same table otherwise
        raise CacheFormatError(
            f"{folder.where}, {file.name}: is missing or damaged, and made again from the shards it has sha256 "
            f"{found[:12]}, not that of the manifest ({file.sha256[:12]}). {REMEDY}"
        )
    folder.publish(file.name, data)
