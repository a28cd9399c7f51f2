"""The index: every key of a cache, with the place of its example.

A sorted table for each segment, of some 22 bytes an example, mapped and searched where it lies, so that a cache
of a million examples opens without touching a shard.  The number of positions is in it too: a step's global
count of labels is known before any row is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.arrow_file import open_uncompressed
from shared.cache.format import (
    KEY_BYTES,
    KEY_DTYPE,
    UNSIGNED,
    as_buffer,
    keys_of,
    make_metadata,
    narrowest,
    read_metadata,
)
from shared.cache.manifest import Manifest
from shared.cache.segments import REMEDY, FileInfo
from shared.errors import CacheFormatError

PLACES = pa.uint32()
ShardColumns = tuple[
    npt.NDArray[np.bytes_], npt.NDArray[np.integer]
]  # keys and num_positions, in stored order
Keys = Sequence[bytes] | npt.NDArray[Any]  # 16 bytes each: (n, 16) uint8 or (n,) S16


@dataclass(frozen=True, eq=False)
class KeyIndex:
    """One segment's: the table's columns, (R,) each, and where the shards begin in the order of capture.

    Shapes   keys S16, sorted as unsigned bytes; places uint32: an example's number in that order;
             num_positions unsigned; starts (S + 1,) int64: the places of shard s are starts[s]:starts[s + 1]
    """

    keys: npt.NDArray[np.bytes_]
    places: npt.NDArray[np.uint32]
    num_positions: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_shards(cls, shards: Sequence[ShardColumns]) -> KeyIndex:
        """The index of these shards."""
        keys = np.concatenate([keys for keys, _ in shards] or [np.empty(0, dtype=KEY_DTYPE)])
        counts = np.concatenate([counts for _, counts in shards] or [np.empty(0, dtype=np.uint32)])
        order = np.argsort(keys, kind="stable")
        starts = np.append(0, np.cumsum([len(keys) for keys, _ in shards], dtype=np.int64))
        return cls(keys[order], order.astype(np.uint32), counts[order].astype(np.uint32), starts)

    def shard_columns(self) -> list[ShardColumns]:
        """What :meth:`from_shards` makes this index of."""
        order = np.argsort(self.places)
        keys, counts = self.keys[order], self.num_positions[order]
        return [(keys[start:stop], counts[start:stop]) for start, stop in pairwise(self.starts.tolist())]

    def locate(self, found: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The shard and the row of examples that :meth:`find` found."""
        places = self.places[found].astype(np.int64)
        shards = np.searchsorted(self.starts, places, side="right") - 1
        return shards, places - self.starts[shards]

    def duplicates(self) -> list[bytes]:
        """Keys that occur more than once."""
        twice = np.unique(self.keys[1:][self.keys[1:] == self.keys[:-1]])
        return split_keys(twice)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """(len(keys),) positions in this table, -1 for those that are not in it."""
        return self.find_array(as_key_array(keys))

    def find_array(self, wanted: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """The same of keys (n,) S16."""
        if not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        place = np.searchsorted(self.keys, wanted)
        place[place == len(self)] = 0
        return np.where(self.keys[place] == wanted, place, -1)

    def encode(self) -> pa.Buffer:
        """The bytes of the index file."""
        keys = pa.py_buffer(np.ascontiguousarray(self.keys))
        kind = narrowest(int(self.num_positions.max(initial=0)))
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(self), [None, keys]),
            pa.array(self.places, PLACES),
            pa.array(self.num_positions).cast(kind),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _schema(kind)) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=_schema(kind)))
        return sink.getvalue()


@dataclass(frozen=True, eq=False)
class CacheIndex:
    """A whole cache's: the segments' indices one after the other.

    Shapes   first_rows, first_shards (P + 1,) int64: of the P parts, and behind the last
    """

    parts: tuple[KeyIndex, ...]
    first_rows: npt.NDArray[np.int64]
    first_shards: npt.NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[KeyIndex]) -> Self:
        held = tuple(parts)
        rows, shards = [len(part) for part in held], [len(part.starts) - 1 for part in held]
        return cls(held, _bounds(rows), _bounds(shards))

    @classmethod
    def open(cls, manifest: Manifest, read: Callable[[FileInfo], pa.Buffer], *, where: str) -> Self:
        """``read`` gives a file's bytes, their hash checked.  Raises CacheFormatError for damaged ones."""
        sizes, first, parts = manifest.shards.column("examples"), 0, []
        for segment in manifest.segments:
            held, file = sizes[first : first + segment.shards], segment.index
            parts.append(open_index(read(file), shard_sizes=held, where=f"{where}, {file.name}"))
            first += segment.shards
        return cls.of(parts)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @property
    def keys(self) -> npt.NDArray[np.bytes_]:
        """(R,) S16, all of them, in ascending order within a segment."""
        return np.concatenate([np.empty(0, KEY_DTYPE), *(part.keys for part in self.parts)])

    @property
    def num_positions(self) -> npt.NDArray[np.int64]:
        """(R,) of all examples, in the order of ``keys``."""
        return np.concatenate([np.empty(0, np.int64), *(part.num_positions for part in self.parts)])

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """(len(keys),) positions in ``keys``, -1 for those that are not in it."""
        return self.find_array(as_key_array(keys))

    def find_array(self, wanted: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """The same of keys (n,) S16."""
        found = np.full(len(wanted), -1, dtype=np.int64)
        missing = np.arange(len(wanted))
        for part, first in zip(self.parts, self.first_rows.tolist(), strict=False):
            places = part.find_array(wanted[missing])
            is_here = places >= 0
            found[missing[is_here]] = first + places[is_here]
            missing = missing[~is_here]
        return found

    def lengths(self, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of positions of examples that :meth:`find` found."""
        lengths = np.empty(len(found), dtype=np.int64)
        for part, rows, here in self._by_part(found):
            lengths[here] = self.parts[part].num_positions[rows]
        return lengths

    def locate(self, found: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The shard and the row of examples that :meth:`find` found."""
        shards, numbers = np.empty((2, len(found)), dtype=np.int64)
        for part, rows, here in self._by_part(found):
            in_part, numbers[here] = self.parts[part].locate(rows)
            shards[here] = self.first_shards[part] + in_part
        return shards, numbers

    def shard_columns(self) -> Iterator[ShardColumns]:
        """Keys and numbers of positions of each shard, in stored order."""
        for part in self.parts:
            yield from part.shard_columns()

    def _by_part(
        self, found: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """Each part that holds some of the rows: its number, the rows in it, and which of ``found`` they are."""
        part_of = np.searchsorted(self.first_rows, found, side="right") - 1
        for part in np.unique(part_of).tolist():
            here = part_of == part
            yield part, found[here] - self.first_rows[part], here


def _bounds(sizes: Sequence[int] | npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return np.append(0, np.cumsum(sizes, dtype=np.int64)).astype(np.int64)


def _schema(num_positions: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("key", pa.binary(KEY_BYTES), nullable=False),
            pa.field("place", PLACES, nullable=False),
            pa.field("num_positions", num_positions, nullable=False),
        ],
        metadata=make_metadata({"index": True}),
    )


def open_index(
    source: Path | bytes | pa.Buffer, *, shard_sizes: Sequence[int] | npt.NDArray[np.uint64], where: str
) -> KeyIndex:
    """Maps an index file, or looks into the bytes of one; ``shard_sizes``: the examples of each shard.

    Raises   CacheFormatError  when it is not an index of this format, or has not that many rows
    """
    try:
        buffer = as_buffer(source)
        stream = open_uncompressed(buffer, where=where)
        read_metadata(stream.schema, where=where)
        if stream.schema not in [_schema(kind) for kind in UNSIGNED] or stream.num_record_batches != 1:
            raise CacheFormatError(f"{where}: its columns are not those of an index.")
        batch = stream.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheFormatError(f"{where}: cannot be read as an Arrow file ({error}).") from error
    starts = _bounds(shard_sizes)
    if len(batch) != starts[-1]:
        raise CacheFormatError(f"{where}: {len(batch)} keys found, {starts[-1]} examples in the manifest.")
    places = batch.column("place").to_numpy()
    if places.max(initial=0) >= max(len(batch), 1):
        raise CacheFormatError(f"{where}: place {places.max()} found, with {len(batch)} examples. {REMEDY}")
    return KeyIndex(keys_of(batch), places, batch.column("num_positions").to_numpy(), starts)


def split_keys(keys: npt.NDArray[np.bytes_]) -> list[bytes]:
    """Keys as bytes objects.  (A NumPy scalar would lose its trailing zero bytes.)"""
    joined = keys.tobytes()
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


def as_key_array(keys: Keys) -> npt.NDArray[np.bytes_]:
    """(len(keys),) S16; of an array a view, where its memory allows.

    Raises   ValueError  for a key of another length
    """
    if isinstance(keys, np.ndarray):
        if (keys.dtype, *keys.shape[1:]) not in [(KEY_DTYPE,), (np.uint8, KEY_BYTES)]:
            raise ValueError(f"keys have {KEY_BYTES} bytes, not {keys.shape[1:]} of {keys.dtype}")
        return np.ascontiguousarray(keys).view(KEY_DTYPE).reshape(len(keys))
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys) or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"keys have {KEY_BYTES} bytes")
    return np.frombuffer(joined, dtype=KEY_DTYPE)
