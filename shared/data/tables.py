"""Parquet and Arrow files as the rows of one table, read where they lie.

    rows = TableRows.open([Path("train-0.parquet"), Path("train-1.parquet")], folder=Path("."))
    rows.select(["question", "answer"])[17]

Arrow files are memory-mapped.  Parquet is read a row group at a time, and the last groups are kept.  What is
compressed may unfold to ``MAX_BLOCK_BYTES`` at a time, and to nothing beyond.  A row group
of more than ``MAX_GROUP_BYTES`` would be decoded again for nearly every row of a shuffled epoch, so such a file
is copied once to a memory-mapped Arrow file.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.arrow_messages import MALFORMED, blocks, decoded_bytes
from shared.data.copies import Stamp, kept_copy, mark_used, require_unchanged
from shared.data.data_files import DataFile
from shared.data.features import as_values, described_columns
from shared.errors import DataError, FileError, TeachonceError

MAX_GROUP_BYTES = 64 * 2**20  # of the columns in use, decoded
MAX_BLOCK_BYTES = 2**30
MAX_OPEN_FILES = 64  # of each process, whose limit is often 1,024 descriptors
MAX_KEPT_BYTES = 128 * 2**20  # of decoded blocks, for each process
# What Arrow, and Python's own types, raise for damage and for values that they cannot hold.
UNREADABLE = (pa.ArrowException, ArithmeticError, ImportError, LookupError, OSError, ValueError)
END_OF_STREAM = (
    b"\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x00\x00\x00\x00",
)  # today's mark and the one before it


@dataclass(frozen=True)
class TableFile:
    """One file and where its blocks lie: row groups of Parquet, record batches of Arrow."""

    path: Path
    stamp: Stamp
    columns: tuple[str, ...]
    described: dict[str, Any]  # what the library datasets says of columns that need it
    block_rows: tuple[int, ...]
    block_bytes: tuple[dict[str, int], ...]  # of each column, decoded; empty for Arrow

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    @classmethod
    def of(cls, path: Path) -> TableFile:
        """Reads the file's own description and none of its rows."""
        stamp = Stamp.of(path)
        if path.suffix != ".parquet":
            opened, num_batches, schema = _open_arrow(path)
            sizes = tuple(opened.block(number).num_rows for number in range(num_batches))
            return cls(path, stamp, tuple(schema.names), _described(schema), sizes, ())
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            schema = file.schema_arrow
            sizes = tuple(group.num_rows for group in groups)
            num_bytes = tuple(_column_bytes(group) for group in groups)
        return cls(path, stamp, tuple(schema.names), _described(schema), sizes, num_bytes)

    def rows_together(self, block: int, columns: Sequence[str]) -> int:
        """So many rows that not even the largest value in each of them exceeds ``MAX_BLOCK_BYTES``."""
        largest = max((self.block_bytes[block].get(name, 0) for name in columns), default=0)
        return max(1, min(self.block_rows[block], MAX_BLOCK_BYTES // max(largest, 1)))

    def require_unchanged(self) -> None:
        """Raises   FileError  when the file is not the one that was described"""
        require_unchanged(self.path, self.stamp)


@dataclass(frozen=True)
class OpenFile:
    """How the blocks of a file are read, by number."""

    block: Callable[[int], pa.Table | pa.RecordBatch]
    close: Callable[[], None]


@dataclass(eq=False)
class TableRows:
    """Rows of files with the same columns; cheap to pickle, each process opens the files for itself."""

    files: tuple[TableFile, ...]
    folder: Path  # where a row's relative picture path starts
    columns: list[str]
    _opened: OrderedDict[int, OpenFile] = field(default_factory=OrderedDict, repr=False)
    _kept: OrderedDict[tuple[int, int], pa.Table | pa.RecordBatch] = field(
        default_factory=OrderedDict, repr=False
    )

    @classmethod
    def open(cls, paths: Sequence[Path], *, folder: Path) -> TableRows:
        """Raises   DataError  when the files' columns differ, or Arrow's own error for what is no such file."""
        files = tuple(TableFile.of(path) for path in paths)
        for file in files[1:]:
            if set(file.columns) != set(files[0].columns):
                odd = sorted(set(file.columns) ^ set(files[0].columns))
                raise DataError(
                    f"{file.path}: its columns differ from those of {files[0].path.name} ({', '.join(odd)}); the "
                    "files of a split must have the same ones"
                )
        return cls(files, folder, list(files[0].columns))

    def __post_init__(self) -> None:
        sizes = [rows for file in self.files for rows in file.block_rows]
        self._places = [
            (n, block) for n, file in enumerate(self.files) for block in range(len(file.block_rows))
        ]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict(), "_kept": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises   DataError  when the file is damaged there
        FileError  when it cannot be read at all, or has changed: no fault of the row
        """
        place = int(np.searchsorted(self._ends, index, side="right"))
        number, block = self._places[place]
        begin = int(self._ends[place - 1]) if place else 0
        file = self.files[number]
        try:
            one = self._block(number, block).slice(index - begin, 1).select(self.columns)
            row = one.to_pylist()[0]
        except TeachonceError:
            raise
        except UNREADABLE as error:
            raise DataError(f"{file.path}, block {block}: cannot be read ({_first_line(error)})") from error
        try:
            return as_values(row, one.schema, file.described)
        except DataError as error:
            raise DataError(f"{file.path}, row {index - begin} of block {block}: {error}") from error

    def folder_of(self, index: int) -> Path:
        return self.folder

    def data_files(self) -> list[DataFile]:
        return [DataFile(file.path, sum(file.block_rows), file.stamp) for file in self.files]

    def select(self, columns: Sequence[str]) -> TableRows:
        """The same rows with some of the columns; the others are not read.

        Raises   DataError  when one of them stands twice
        """
        for file in self.files:
            if twice := sorted(name for name in columns if file.columns.count(name) > 1):
                raise DataError(
                    f"{file.path}: {twice[0]!r} is the name of several columns. Rename all but one"
                )
        return replace(self, columns=list(columns), _opened=OrderedDict(), _kept=OrderedDict())

    def _block(self, number: int, block: int) -> pa.Table | pa.RecordBatch:
        if (number, block) not in self._kept:
            self._kept[number, block] = self._open(number).block(block)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((number, block))
        return self._kept[number, block]

    def _open(self, number: int) -> OpenFile:
        if number not in self._opened:
            file = self.files[number]
            file.require_unchanged()
            try:
                self._opened[number] = _opened(file, self.columns)
            except OSError as error:
                raise FileError(f"{file.path}: cannot be opened ({error})") from error
            while len(self._opened) > MAX_OPEN_FILES:
                self._opened.popitem(last=False)[1].close()
        self._opened.move_to_end(number)
        return self._opened[number]


def _opened(file: TableFile, columns: list[str]) -> OpenFile:
    if not file.is_parquet:
        return _open_arrow(file.path)[0]
    largest = max((sum(sizes.get(name, 0) for name in columns) for sizes in file.block_bytes), default=0)
    if largest > MAX_GROUP_BYTES:
        return _as_blocks(_mapped_copy(file), file.block_rows)
    parquet = pq.ParquetFile(file.path)
    return OpenFile(lambda block: _row_group(file, parquet, block, columns), parquet.close)


def _row_group(file: TableFile, parquet: pq.ParquetFile, block: int, columns: list[str]) -> pa.Table:
    """A few rows at a time, so that repeated values, which take a bit each in the file, cannot take all memory.

    Raises   DataError  when they unfold to more than ``MAX_BLOCK_BYTES``
    """
    batches, total = [], 0
    for batch in parquet.iter_batches(
        file.rows_together(block, columns), row_groups=[block], columns=columns, use_threads=False
    ):
        batches.append(batch)
        total += batch.nbytes
        if total > MAX_BLOCK_BYTES:
            raise DataError(f"{file.path}: {_unfolds(f'row group {block}', f'more than {total:,}')}")
    return pa.Table.from_batches(batches)


def _as_blocks(copy: Path, sizes: Sequence[int]) -> OpenFile:
    """The batches of a mapped copy, cut where the blocks of its file end; copies nothing."""
    opened, num_batches, _ = _open_arrow(copy)
    table = pa.Table.from_batches([opened.block(number) for number in range(num_batches)])
    begins = np.cumsum([0, *sizes])

    def block(number: int) -> pa.Table:
        mark_used(copy)
        return table.slice(int(begins[number]), sizes[number])

    return OpenFile(block, opened.close)


def _mapped_copy(file: TableFile) -> Path:
    """An Arrow stream with all columns of a Parquet file.

    Raises   FileError  when it cannot be written
    """
    remedy = (
        "Its row groups are too large to be decoded for each row: make room, set TEACHONCE_COPIES to another folder, "
        "or write the file with smaller row groups"
    )
    return kept_copy(
        file.path, file.stamp, ".arrow", write=lambda part: _write_copy(file, part), remedy=remedy
    )


def _write_copy(file: TableFile, part: Path) -> None:
    with (
        pq.ParquetFile(file.path) as source,
        pa.OSFile(str(part), "wb") as sink,
        pa.ipc.new_stream(sink, source.schema_arrow) as writer,  # not a file: its dictionaries may not change
    ):
        for block in range(len(file.block_rows)):
            rows = min(256, file.rows_together(block, file.columns))
            for batch in source.iter_batches(rows, row_groups=[block], use_threads=False):
                writer.write_batch(batch)
    file.require_unchanged()


def _open_arrow(path: Path) -> tuple[OpenFile, int, pa.Schema]:
    """How the batches of an Arrow file or stream are read, their number, their schema; memory-mapped.

    Raises   DataError  for a stream that was cut between two batches, which Arrow takes for a shorter one
    """
    mapped = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(mapped)
    except pa.ArrowInvalid:
        mapped.seek(max(mapped.size() - 8, 0))
        if not mapped.read(8).endswith(END_OF_STREAM):
            raise DataError(
                f"{path}: the Arrow stream has no end mark; the file was cut, or is no Arrow file"
            ) from None
        mapped.seek(0)
        return _open_stream(mapped, path)
    data = memoryview(mapped.read_buffer())

    def batch(number: int) -> pa.RecordBatch:
        _require_bounded(path, lambda: _messages_of_file(data, number))
        return reader.get_batch(number)

    return OpenFile(batch, mapped.close), reader.num_record_batches, reader.schema


def _open_stream(mapped: pa.MemoryMappedFile, path: Path) -> tuple[OpenFile, int, pa.Schema]:
    """A batch is decoded when it is asked for: compressed ones would take the memory of all rows at once."""
    described, *messages = pa.ipc.MessageReader.open_stream(mapped)
    if all(message.type == "record batch" for message in messages):
        schema = pa.ipc.read_schema(described)

        def batch(number: int) -> pa.RecordBatch:
            _require_bounded(path, lambda: _parts(messages[number : number + 1]))
            return pa.ipc.read_record_batch(messages[number], schema)

        return OpenFile(batch, mapped.close), len(messages), schema
    _require_bounded(path, lambda: _parts(messages))
    mapped.seek(0)  # dictionaries among them, which only a reader of the whole stream can take
    stream = pa.ipc.open_stream(mapped)
    batches = list(stream)
    return OpenFile(batches.__getitem__, mapped.close), len(batches), stream.schema


def _messages_of_file(data: memoryview, number: int) -> Iterator[tuple[memoryview, memoryview]]:
    """What Arrow decodes for one batch of a file: it, and before the first one all dictionaries."""
    dictionaries, batches = blocks(data)
    return (block.of(data) for block in (*dictionaries, batches[number]))


def _parts(messages: Sequence[pa.Message]) -> Iterator[tuple[memoryview, memoryview]]:
    return ((memoryview(message.metadata), memoryview(message.body)) for message in messages)


def _require_bounded(path: Path, messages: Callable[[], Iterator[tuple[memoryview, memoryview]]]) -> None:
    """Raises   DataError  before compressed messages are decoded that unfold to more than ``MAX_BLOCK_BYTES``"""
    try:
        total = sum(decoded_bytes(*parts) for parts in messages())
    except MALFORMED as error:
        raise DataError(f"{path}: no Arrow file: its metadata point outside of it. Fetch it again") from error
    if total > MAX_BLOCK_BYTES:
        raise DataError(f"{path}: {_unfolds('a batch of rows', f'{total:,}')}")


def _unfolds(what: str, num_bytes: str) -> str:
    return (
        f"{what} unfolds to {num_bytes} bytes; at most {MAX_BLOCK_BYTES:,} are decoded together. Write the file with "
        "fewer rows in each"
    )


def _column_bytes(group: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for number in range(group.num_columns):
        column = group.column(number)
        name = column.path_in_schema.split(".")[0]
        sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
    return sizes


def _described(schema: pa.Schema) -> dict[str, Any]:
    """How the library ``datasets`` describes those of its columns whose cells do not say it all."""
    try:
        return described_columns(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
