"""The list of a cache's shards, as Arrow columns: an entry becomes a Python object when somebody asks for it.

Format version 2 keeps the list in files of its own, one for each segment; version 1 kept it in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from shared.cache.arrow_file import open_uncompressed
from shared.cache.format import (
    KEY_BYTES,
    LIST_VERSION,
    MAX_SHARD_BYTES,
    as_buffer,
    first_line,
    make_metadata,
    read_metadata,
)
from shared.cache.identity import Record
from shared.cache.layout import SHARD_NAME, sha256_in, shard_name, unit_in
from shared.errors import CacheFormatError

UNIT_BYTES, HASH_BYTES = 8, 32
MAX_ROW_ENTRIES = 1 << 24  # of one example, as payloads have it
MAX_COUNT = 1 << 53  # what every JSON reader keeps exact
COUNTS = ("bytes", "examples", "positions", "entries", "truncated")
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]


class ShardInfo(Record):
    """One shard file: what it is called, what it must hash to, what it holds."""

    name: FileName  # relative to the cache, with "/"
    sha256: Sha256
    bytes: Count
    examples: Count
    positions: Count
    entries: Count
    truncated: Count  # examples whose answer was cut to max_answer_tokens

    @model_validator(mode="after")
    def _fits_its_bytes(self) -> Self:
        """No work is planned by numbers that the file cannot hold: a key, and a byte a position, at least."""
        if self.bytes > MAX_SHARD_BYTES:
            raise ValueError(f"{self.bytes} bytes found, a shard has at most {MAX_SHARD_BYTES}")
        if KEY_BYTES * self.examples + self.positions > self.bytes or self.truncated > self.examples:
            raise ValueError(
                f"{self.examples} examples ({self.truncated} truncated) and {self.positions} positions do not "
                f"fit into {self.bytes} bytes"
            )
        if self.entries > MAX_ROW_ENTRIES * self.examples:
            raise ValueError(f"{self.entries} entries found, more than {self.examples} examples can have")
        return self


SCHEMA = pa.schema(
    [
        pa.field("unit", pa.binary(UNIT_BYTES), nullable=False),
        pa.field("sha256", pa.binary(HASH_BYTES), nullable=False),
        *(pa.field(name, pa.uint64(), nullable=False) for name in COUNTS),
    ],
    metadata=make_metadata({"list": True}, version=LIST_VERSION),
)


class ShardList(Sequence[ShardInfo]):
    """The shards of a cache in their order.  Slices and orders share its columns; files stay mapped."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> Self:
        """Raises   ValueError  when a shard's name is not made of its unit and its hash"""
        infos = list(shards)
        for info in infos:
            if not SHARD_NAME.fullmatch(info.name) or sha256_in(info.name) != info.sha256:
                raise ValueError(f"{info.name}: a shard is called shards/<unit>-<sha256>.arrow")
        columns = [
            pa.array([bytes.fromhex(unit_in(info.name)) for info in infos], pa.binary(UNIT_BYTES)),
            pa.array([bytes.fromhex(info.sha256) for info in infos], pa.binary(HASH_BYTES)),
            *(pa.array([getattr(info, name) for info in infos], pa.uint64()) for name in COUNTS),
        ]
        return cls(pa.Table.from_arrays(columns, schema=SCHEMA))

    @classmethod
    def joined(cls, parts: Iterable[ShardList]) -> Self:
        """One after the other; nothing is copied."""
        return cls(pa.concat_tables([SCHEMA.empty_table(), *(part._table for part in parts)]))

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, place: slice) -> ShardList: ...
    def __getitem__(self, place: int | slice) -> ShardInfo | ShardList:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        place = range(len(self))[place]  # negative ones, and the error for others
        (row,) = self._table.slice(place, 1).to_pylist()
        return _info(row)

    def __iter__(self) -> Iterator[ShardInfo]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from map(_info, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardList) and self._table.equals(other._table)

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: npt.NDArray[np.int64]) -> ShardList:
        """The shards at these places, in that order."""
        return ShardList(self._table.take(pa.array(places)))

    def column(self, name: str) -> npt.NDArray[np.uint64]:
        """(S,) one of ``COUNTS`` for each shard."""
        return self._table.column(name).to_numpy()

    def total(self, name: str) -> int:
        """The sum of one of ``COUNTS``."""
        return pc.sum(self._table.column(name)).as_py() or 0

    def names(self) -> list[str]:
        """All file names, in order."""
        units, digests = (self._table.column(name).to_pylist() for name in ("unit", "sha256"))
        return [shard_name(unit.hex(), sha256.hex()) for unit, sha256 in zip(units, digests, strict=True)]

    def encode(self) -> pa.Buffer:
        """The bytes of a list file: equal for equal shards."""
        columns = [column.combine_chunks() for column in self._table.columns]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        return sink.getvalue()


def open_list(source: Path | bytes | pa.Buffer, *, where: str) -> ShardList:
    """Maps a list file, or looks into the bytes of one; all its numbers are compared with their bounds.

    Raises   CacheFormatError  when it is not a list of this format, or says what no shard can be
    """
    try:
        stream = open_uncompressed(as_buffer(source), where=where)
        read_metadata(stream.schema, where=where)
        if stream.schema != SCHEMA or stream.num_record_batches != 1:
            raise CacheFormatError(f"{where}: its columns are not those of a list of shards.")
        batch = stream.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheFormatError(f"{where}: cannot be read as an Arrow file ({first_line(error)}).") from error
    if any(column.null_count for column in batch.columns):
        raise CacheFormatError(f"{where}: null values found, none allowed.")
    found = ShardList(pa.Table.from_batches([batch], SCHEMA))
    _require_possible(found, where=where)
    return found


def _require_possible(shards: ShardList, *, where: str) -> None:
    """What a ``ShardInfo`` refuses, of all entries at once."""
    counts = {name: shards.column(name) for name in COUNTS}
    wrong = np.zeros(len(shards), dtype=bool)
    for column in counts.values():
        wrong |= column >= MAX_COUNT
    num_bytes, examples = counts["bytes"], counts["examples"]
    wrong |= (num_bytes > MAX_SHARD_BYTES) | (counts["truncated"] > examples)
    wrong |= KEY_BYTES * examples + counts["positions"] > num_bytes
    wrong |= counts["entries"] > MAX_ROW_ENTRIES * np.minimum(examples, MAX_SHARD_BYTES)
    for place in np.flatnonzero(wrong)[:1].tolist():
        try:
            shards[place]
        except ValueError as error:
            raise CacheFormatError(f"{where}, entry {place}: {_reason(error)}.") from error


def _reason(error: Any) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join([*map(str, found["loc"]), found["msg"]])


def _info(row: dict[str, Any]) -> ShardInfo:
    unit, sha256 = row.pop("unit").hex(), row.pop("sha256").hex()
    return ShardInfo(name=shard_name(unit, sha256), sha256=sha256, **row)
