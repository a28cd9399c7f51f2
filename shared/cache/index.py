"""The index: every key of a cache in order, with the shard and the row that hold it.

A sorted table of 28 bytes an example, mapped and searched where it lies, so that a cache of a million
examples opens without touching a shard.  The number of positions is in it too: a step's global count of
labels is known before any row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.format import (
    KEY_BYTES,
    KEY_DTYPE,
    as_buffer,
    make_metadata,
    read_metadata,
    sha256_hex,
)
from shared.cache.manifest import IndexInfo
from shared.cache.storage import Folder
from shared.errors import CacheFormatError

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("num_positions", pa.int32(), nullable=False),
    ],
    metadata=make_metadata({"index": True}),
)


@dataclass(frozen=True, eq=False)
class KeyIndex:
    """The table's columns, all (R,): keys S16, sorted as unsigned bytes; the others int32."""

    keys: npt.NDArray[np.bytes_]
    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    num_positions: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(cls) -> KeyIndex:
        number = np.empty(0, dtype=np.int32)
        return cls(np.empty(0, dtype=KEY_DTYPE), number, number, number)

    @classmethod
    def from_shards(
        cls, parts: Sequence[tuple[int, npt.NDArray[np.bytes_], npt.NDArray[np.int32]]]
    ) -> KeyIndex:
        """The index of shards given as (shard, keys, num_positions), rows in stored order."""
        if not parts:
            return cls.empty()
        shards = [np.full(len(keys), shard, dtype=np.int32) for shard, keys, _ in parts]
        rows = [np.arange(len(keys), dtype=np.int32) for _, keys, _ in parts]
        return cls(
            np.concatenate([keys for _, keys, _ in parts]),
            np.concatenate(shards),
            np.concatenate(rows),
            np.concatenate([counts for _, _, counts in parts]).astype(np.int32),
        ).sorted()

    def sorted(self) -> KeyIndex:
        """By key, then by place."""
        order = np.lexsort((self.rows, self.shards, self.keys))
        return KeyIndex(self.keys[order], self.shards[order], self.rows[order], self.num_positions[order])

    def moved(self, places: npt.NDArray[np.int32]) -> KeyIndex:
        """With shard ``s`` renumbered ``places[s]``, and its examples left out where that is -1."""
        shards = places[self.shards] if len(self) else self.shards
        stays = shards >= 0
        return KeyIndex(self.keys[stays], shards[stays], self.rows[stays], self.num_positions[stays])

    def joined(self, other: KeyIndex) -> KeyIndex:
        """The examples of both."""
        return KeyIndex(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.shards, other.shards]),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.num_positions, other.num_positions]),
        ).sorted()

    def duplicates(self) -> list[bytes]:
        """Keys that occur more than once."""
        twice = np.unique(self.keys[1:][self.keys[1:] == self.keys[:-1]])
        return split_keys(twice)

    def find(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """(len(keys),) positions in this table, -1 for those that are not in it."""
        wanted = as_key_array(keys)
        if not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        place = np.searchsorted(self.keys, wanted)
        place[place == len(self)] = 0
        return np.where(self.keys[place] == wanted, place, -1)

    def encode(self) -> pa.Buffer:
        """The bytes of the index file."""
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(KEY_BYTES), len(self), [None, pa.py_buffer(np.ascontiguousarray(self.keys))]
            ),
            *(pa.array(column, pa.int32()) for column in (self.shards, self.rows, self.num_positions)),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, INDEX_SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA))
        return sink.getvalue()


def open_index(source: Path | bytes | pa.Buffer, *, where: str) -> KeyIndex:
    """Maps an index file, or looks into the bytes of one.

    Raises   CacheFormatError  when it is not an index of this format
    """
    try:
        buffer = as_buffer(source)
        stream = pa.ipc.open_file(buffer)
        read_metadata(stream.schema, where=where)
        if not stream.schema.equals(INDEX_SCHEMA) or stream.num_record_batches != 1:
            raise CacheFormatError(f"{where}: its columns are not those of an index.")
        batch = stream.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise CacheFormatError(f"{where}: cannot be read as an Arrow file ({error}).") from error
    keys = np.frombuffer(batch.column("key").buffers()[1] or b"", dtype=KEY_DTYPE)[: len(batch)]
    return KeyIndex(keys, *(batch.column(name).to_numpy() for name in ("shard", "row", "num_positions")))


def load_index(folder: Folder, info: IndexInfo) -> KeyIndex:
    """The index that a manifest names, its hash checked."""
    where = f"{folder.where}, {info.name}"
    try:
        data = folder.read(info.name)
    except FileNotFoundError as error:
        raise CacheFormatError(f"{where}: is missing. Restore it, or capture the cache again.") from error
    if sha256_hex(data) != info.sha256:
        raise CacheFormatError(
            f"{where}: sha256 {sha256_hex(data)[:12]} differs from the manifest ({info.sha256[:12]}). "
            "Restore the file, or capture the cache again."
        )
    return open_index(data, where=where)


def split_keys(keys: npt.NDArray[np.bytes_]) -> list[bytes]:
    """Keys as bytes objects.  (A NumPy scalar would lose its trailing zero bytes.)"""
    joined = keys.tobytes()
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


def as_key_array(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    """(len(keys),) S16.

    Raises   ValueError  for a key of another length
    """
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys) or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"keys have {KEY_BYTES} bytes")
    return np.frombuffer(joined, dtype=KEY_DTYPE)
