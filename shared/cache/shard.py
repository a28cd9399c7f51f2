"""Shards: one row per example, one record batch per shard.

Equal rows give equal bytes: there are no times, hosts or hash orders in a shard, and the metadata is
canonical JSON.  The answers' token ids are dictionary-encoded within a shard: two bytes a position instead
of four, and still a plain column for any Arrow tool.  Payloads are not compressed again, so that a row can
be read alone from a memory map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.arrow_file import open_uncompressed
from shared.cache.format import (
    KEY_BYTES,
    LOG_PROBS_VERSION,
    ROWS_VERSION,
    as_buffer,
    first_line,
    keys_of,
    make_metadata,
    narrowest,
    read_metadata,
)
from shared.cache.storage import Folder, LocalFolder
from shared.errors import CacheFormatError

OF_POSITIONS = pa.list_(pa.field("item", pa.float16(), nullable=False))
MAX_PAYLOAD_BYTES = 2**31 - 1  # of a shard's rows together: the column's offsets are 32 bits wide
OPTIONAL = ("label_log_prob", "label_gain")  # columns with a number for each position


@dataclass(frozen=True, eq=False)
class Row:
    """What the cache holds of one example.

    Shapes   key 16 bytes; answer_ids (n,) int32, n positions; entropy_sums (T,) float64, one for each
             captured temperature; payload: the entries, as ``shared.codec.encode`` wrote them;
             label_log_prob (n,) fp16, natural logs at temperature 1, of caches that keep them
             label_gain (n,) fp16, of caches that keep it: by how much the pictures raise these logs
    Units    ce_sum and entropy_sums in nats, summed over the row's positions; a shard holds them as float32
    """

    key: bytes
    answer_ids: npt.NDArray[np.int32]
    num_entries: int
    ce_sum: float
    entropy_sums: npt.NDArray[np.float64]
    payload: bytes
    truncated: bool = False
    label_log_prob: npt.NDArray[np.float16] | None = None
    label_gain: npt.NDArray[np.float16] | None = None

    @property
    def num_positions(self) -> int:
        return len(self.answer_ids)


def _schema(
    num_temperatures: int,
    *,
    token_index: pa.DataType,
    num_positions: pa.DataType,
    num_entries: pa.DataType,
    optional: Sequence[str],
    metadata: Mapping[str, Any],
) -> pa.Schema:
    """The columns of a shard: three of them have integers as narrow as its rows allow."""
    token = pa.dictionary(token_index, pa.int32())
    columns = {
        "key": pa.binary(KEY_BYTES),
        "answer_ids": pa.list_(pa.field("item", token, nullable=False)),
        "num_positions": num_positions,
        "num_entries": num_entries,
        "truncated": pa.bool_(),
        "ce_sum": pa.float32(),
        "entropy_sums": pa.list_(pa.field("item", pa.float32(), nullable=False), num_temperatures),
        "payload": pa.binary(),
    }
    columns |= dict.fromkeys(optional, OF_POSITIONS)
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    version = LOG_PROBS_VERSION if optional else ROWS_VERSION
    return pa.schema(fields, metadata=make_metadata(metadata, version=version))


def encode_shard(
    rows: Sequence[Row],
    *,
    num_temperatures: int,
    metadata: Mapping[str, Any],
    optional: Sequence[str] = (),
) -> pa.Buffer:
    """The bytes of the shard that holds these rows, in this order.

    ``optional``: of these columns, which else are left out
    Raises   ValueError  when a row contradicts itself: that is the caller's mistake, not the user's
    Holds    equal rows and metadata give equal bytes
    """
    for row in rows:
        _check_row(row, num_temperatures, optional)
    lengths = np.array([row.num_positions for row in rows], dtype=np.int64)
    entries = np.array([row.num_entries for row in rows], dtype=np.int64)
    answers = [np.asarray(row.answer_ids, dtype=np.int32) for row in rows]
    distinct, indices = np.unique(np.concatenate([np.empty(0, np.int32), *answers]), return_inverse=True)
    shard_schema = _schema(
        num_temperatures,
        token_index=narrowest(len(distinct) - 1),
        num_positions=narrowest(int(lengths.max(initial=0))),
        num_entries=narrowest(int(entries.max(initial=0))),
        optional=optional,
        metadata=metadata,
    )
    kinds = {field.name: field.type for field in shard_schema}
    tokens = pa.DictionaryArray.from_arrays(
        pa.array(indices).cast(kinds["answer_ids"].value_type.index_type), pa.array(distinct, pa.int32())
    )
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    sums = pa.array(np.array([row.entropy_sums for row in rows], dtype=np.float32).reshape(-1))
    columns = [
        pa.array([row.key for row in rows], kinds["key"]),
        pa.ListArray.from_arrays(offsets, tokens, type=kinds["answer_ids"]),
        pa.array(lengths).cast(kinds["num_positions"]),
        pa.array(entries).cast(kinds["num_entries"]),
        pa.array([row.truncated for row in rows], kinds["truncated"]),
        pa.array(np.array([row.ce_sum for row in rows], dtype=np.float32)),
        pa.FixedSizeListArray.from_arrays(sums, type=kinds["entropy_sums"]),
        pa.array([row.payload for row in rows], kinds["payload"]),
    ]
    for name in optional:
        joined = pa.array(np.concatenate([np.empty(0, np.float16), *(getattr(row, name) for row in rows)]))
        columns.append(pa.ListArray.from_arrays(offsets, joined, type=OF_POSITIONS))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, shard_schema) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=shard_schema))
    return sink.getvalue()


def _check_row(row: Row, num_temperatures: int, optional: Sequence[str]) -> None:
    if len(row.key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, this one {len(row.key)}")
    if np.shape(row.entropy_sums) != (num_temperatures,):
        raise ValueError(f"entropy_sums {np.shape(row.entropy_sums)} found, ({num_temperatures},) needed")
    if not (np.isfinite(row.ce_sum) and np.isfinite(row.entropy_sums).all()):
        raise ValueError(f"row {row.key.hex()}: a sum is not finite")
    for name in optional:
        values = getattr(row, name)
        given = None if values is None else values.shape
        if given != (row.num_positions,):
            raise ValueError(f"row {row.key.hex()}: {name} {given} found, ({row.num_positions},) needed")


@dataclass(frozen=True, eq=False)
class ShardView:
    """A shard's columns as NumPy views of its bytes; only counts and flags are copied.

    Shapes   keys (R,) S16; answer_offsets, payload_offsets (R + 1,) int32; entropy_sums (R, T) float32
    """

    keys: npt.NDArray[np.bytes_]
    num_positions: npt.NDArray[np.int64]
    num_entries: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    ce_sums: npt.NDArray[np.float32]
    entropy_sums: npt.NDArray[np.float32]
    answer_offsets: npt.NDArray[np.int32]
    answer_indices: npt.NDArray[Any]
    answer_dictionary: npt.NDArray[np.int32]
    payload_offsets: npt.NDArray[np.int32]
    payloads: memoryview
    label_log_probs: npt.NDArray[np.float16] | None  # (N,) of all positions, where the cache keeps them
    label_gains: npt.NDArray[np.float16] | None  # likewise
    num_bytes: int
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.num_positions)

    def answer_ids(self, row: int) -> npt.NDArray[np.int32]:
        """(n,) int32, a copy."""
        return self.answer_dictionary[
            self.answer_indices[self.answer_offsets[row] : self.answer_offsets[row + 1]]
        ]

    def payload(self, row: int) -> bytes:
        return bytes(self.payloads[self.payload_offsets[row] : self.payload_offsets[row + 1]])

    def row(self, row: int) -> Row:
        span = slice(self.answer_offsets[row], self.answer_offsets[row + 1])
        return Row(
            key=self.key(row),
            answer_ids=self.answer_ids(row),
            num_entries=int(self.num_entries[row]),
            ce_sum=float(self.ce_sums[row]),
            entropy_sums=self.entropy_sums[row].astype(np.float64),
            payload=self.payload(row),
            truncated=bool(self.truncated[row]),
            label_log_prob=None if self.label_log_probs is None else self.label_log_probs[span].copy(),
            label_gain=None if self.label_gains is None else self.label_gains[span].copy(),
        )

    def key(self, row: int) -> bytes:
        return self.keys[row : row + 1].tobytes()


def open_shard(source: Path | bytes | pa.Buffer, *, where: str) -> ShardView:
    """Maps a shard file, or looks into the bytes of one; at every offset and index, so that rows need not.

    Raises   CacheFormatError  when it is not a shard of this format
    """
    try:
        buffer = as_buffer(source)
        stream = open_uncompressed(buffer, where=where)
        metadata = read_metadata(stream.schema, where=where)
        if stream.num_record_batches != 1:
            raise CacheFormatError(f"{where}: {stream.num_record_batches} record batches found, 1 needed.")
        batch = stream.get_batch(0)
        batch.validate(full=True)
        kinds = tuple((field.name, str(field.type)) for field in batch.schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheFormatError(
            f"{where}: cannot be read as an Arrow file ({first_line(error)}). Delete it and capture "
            "again: only its examples are recomputed."
        ) from error
    fault = _column_fault(kinds)
    if fault is not None:
        raise CacheFormatError(f"{where}: {fault}.")
    return _view(batch, metadata, num_bytes=buffer.size, where=where)


def view_shard(folder: Folder, name: str, *, where: str) -> ShardView:
    """A shard's columns, its hash not checked; local files are mapped."""
    return open_shard(
        folder.path / name if isinstance(folder, LocalFolder) else folder.read(name), where=where
    )


def _view(batch: pa.RecordBatch, metadata: Mapping[str, Any], *, num_bytes: int, where: str) -> ShardView:
    if any(column.null_count for column in batch.columns):
        raise CacheFormatError(f"{where}: null values found, none allowed.")
    answers, entropies, payload = (batch.column(name) for name in ("answer_ids", "entropy_sums", "payload"))
    tokens = answers.values
    size = len(batch)
    return ShardView(
        keys=keys_of(batch),
        num_positions=batch.column("num_positions").to_numpy().astype(np.int64),
        num_entries=batch.column("num_entries").to_numpy().astype(np.int64),
        truncated=batch.column("truncated").to_numpy(zero_copy_only=False),
        ce_sums=batch.column("ce_sum").to_numpy(),
        entropy_sums=entropies.values.to_numpy().reshape(size, entropies.type.list_size),
        answer_offsets=answers.offsets.to_numpy(),
        answer_indices=tokens.indices.to_numpy(),
        answer_dictionary=tokens.dictionary.to_numpy(),
        payload_offsets=np.frombuffer(payload.buffers()[1] or bytes(4), np.int32, count=size + 1),
        payloads=memoryview(payload.buffers()[2] or b""),
        label_log_probs=_of_positions("label_log_prob", batch, answers, where=where),
        label_gains=_of_positions("label_gain", batch, answers, where=where),
        num_bytes=num_bytes,
        metadata=metadata,
    )


def _of_positions(
    name: str, batch: pa.RecordBatch, answers: pa.ListArray, *, where: str
) -> npt.NDArray[np.float16] | None:
    """Of all positions, None where there is no such column; a row has as many as answer ids."""
    if name not in batch.schema.names:
        return None
    found = batch.column(name)
    if not found.offsets.equals(answers.offsets) or found.values.null_count:
        raise CacheFormatError(f"{where}: column {name!r} has other positions than 'answer_ids'.")
    return found.values.to_numpy()


@lru_cache(maxsize=256)
def _column_fault(kinds: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with columns of these names and types; integers may be of any width."""
    narrow = pa.uint8()
    wanted = _schema(
        1, token_index=narrow, num_positions=narrow, num_entries=narrow, optional=OPTIONAL, metadata={}
    )
    found = dict(kinds)
    if len(found) != len(kinds):
        return "two columns of one name found"
    for field in wanted:
        if field.name in OPTIONAL and field.name not in found:
            continue
        kind = found.get(field.name)
        if kind is None or _loosely(kind) != _loosely(str(field.type)):
            return f"column {field.name!r} is {kind}, {field.type} needed"
    return None


def _loosely(kind: str) -> str:
    """A type's name without the width of unsigned integers and the number of temperatures."""
    return re.sub(r"\buint(8|16|32)\b", "uint", re.sub(r"^(fixed_size_list<.*>)\[\d+\]$", r"\1", kind))
