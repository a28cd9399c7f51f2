"""What is found of rows, as a table of Arrow with a line for each: key, length, pictures' sizes.

    batch = look(split, processor, range(0, 4096), decode=False)

Nothing in it depends on how pictures are resized: a model's tokens of a picture follow from its size when the
table is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.data.images import decode_rgb, size_by_header
from shared.data.pictures import PictureFile
from shared.data.processing import KEY_BYTES, NO_TOKENS, ExampleProcessor, text_of
from shared.data.rows import Example, VqaSplit
from shared.data.written import NONE, Written, is_students
from shared.errors import DataError

SIZE = pa.struct([("width", pa.int32()), ("height", pa.int32())])
FILE = pa.struct(
    [("path", pa.binary()), ("bytes", pa.int64()), ("modified_ns", pa.int64()), ("changed_ns", pa.int64())]
)
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of its data file
        ("key", pa.binary(KEY_BYTES)),  # null where the row cannot be used
        ("reason", pa.string()),  # why it cannot
        ("text_tokens", pa.int32()),
        ("outvoted", pa.int32()),
        ("written_by", pa.dictionary(pa.int32(), pa.string())),
        ("pictures", pa.list_(SIZE)),
        ("files", pa.list_(FILE)),  # that pictures were read from
    ]
)


@dataclass(frozen=True)
class _Row:
    key: bytes | None = None
    reason: str | None = None
    text: str = ""
    num_ids: int = 0  # of an answer that is given by ids
    outvoted: int = 0
    written_by: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    files: tuple[PictureFile, ...] = ()


def look(
    split: VqaSplit, processor: ExampleProcessor, rows: Sequence[int], *, decode: bool, before: int = 0
) -> pa.RecordBatch:
    """Reads rows of the split, of which ``before`` lie before their file.

    decode   also finds pictures that cannot be decoded
    Raises   FileError  when a file cannot be read at all, or has changed
    """
    seen = [_look_at(split, processor, row, decode=decode) for row in rows]
    texts = [one.text for one in seen if one.key is not None]
    counts = iter(processor.text_tokens(texts) if texts else [])
    return pa.RecordBatch.from_arrays(
        [
            pa.array([row - before for row in rows], pa.int64()),
            pa.array([one.key for one in seen], pa.binary(KEY_BYTES)),
            pa.array([one.reason for one in seen], pa.string()),
            pa.array([0 if one.key is None else next(counts) + one.num_ids for one in seen], pa.int32()),
            pa.array([one.outvoted for one in seen], pa.int32()),
            pa.array([one.written_by for one in seen], pa.string()).dictionary_encode(),
            _sizes([one.sizes for one in seen]),
            _files([one.files for one in seen]),
        ],
        schema=SCHEMA,
    )


def _look_at(split: VqaSplit, processor: ExampleProcessor, row: int, *, decode: bool) -> _Row:
    try:
        example = usable_example(split, processor, row, decode=decode)
    except DataError as error:
        return _Row(reason=str(error))
    return _Row(
        key=processor.key(example),
        text=text_of(example),
        num_ids=len(example.answer_ids or ()),
        outvoted=example.num_outvoted,
        written_by=example.written_by,
        sizes=tuple(map(size_by_header, example.images)),
        files=example.files,
    )


def usable_example(split: VqaSplit, processor: ExampleProcessor, row: int, *, decode: bool) -> Example:
    """Raises   DataError  when the row cannot be used"""
    example = split[row]
    processor.require_usable(example)
    if decode:
        for image in example.images:
            decode_rgb(image, where=split.where(row))
    return example


def _sizes(sizes: Sequence[Sequence[tuple[int, int]]]) -> pa.ListArray:
    flat = np.array([size for one in sizes for size in one], np.int32).reshape(-1, 2)
    columns = [pa.array(np.ascontiguousarray(column)) for column in flat.T]
    return pa.ListArray.from_arrays(_offsets(sizes), pa.StructArray.from_arrays(columns, fields=list(SIZE)))


def _files(files: Sequence[Sequence[PictureFile]]) -> pa.ListArray:
    flat = [file for one in files for file in one]
    columns = [
        pa.array([os.fsencode(file.path) for file in flat], pa.binary()),
        pa.array([file.stamp.num_bytes for file in flat], pa.int64()),
        pa.array([file.stamp.modified_ns for file in flat], pa.int64()),
        pa.array([file.stamp.changed_ns for file in flat], pa.int64()),
    ]
    return pa.ListArray.from_arrays(_offsets(files), pa.StructArray.from_arrays(columns, fields=list(FILE)))


def _offsets(lists: Iterable[Sequence[object]]) -> pa.Array:
    return pa.array([0, *accumulate(map(len, lists))], pa.int32())


def with_written(split: VqaSplit, written: Written, tables: Sequence[pa.Table]) -> pa.Table:
    """A line for each row of the split: that of its written answer, where it has one.

    tables   of the split's own rows, then of each written set
    Raises   DataError  when a row is not what was asked
    """
    now = [key or b"" for key in tables[0].column("key").to_pylist()]
    differs_N = (written.set_N != NONE) & (np.array(now, "S16") != written.keys_N)
    if differs_N.any():
        row = int(differs_N.argmax())
        raise DataError(
            f"{split.where(row)}: its answer in {written.splits[written.set_N[row]].source} was written to another "
            f"prompt ({int(differs_N.sum())} such rows). Ask as the set was asked (data.source, data.system_prompt, "
            "data.train_on, the chat template), or take it out of data.written"
        )
    return pa.concat_tables(tables).take(pa.array(written.lines(len(split))))


def keys_of(table: pa.Table) -> np.ndarray:
    """(n, 16) uint8, of the usable rows in order."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, KEY_BYTES)[chunk.offset :][: len(chunk)]
        for chunk in table.column("key").drop_null().chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.zeros((0, KEY_BYTES), np.uint8)


def num_pictures_of(table: pa.Table) -> int:
    return int(pc.list_value_length(table.column("pictures")).to_numpy().sum())


def writers_of(table: pa.Table) -> Counter[str]:
    """How many lines there are of each writer of answers; "" of those without one."""
    found: Counter[str] = Counter()
    for chunk in table.column("written_by").chunks:
        names, counts = chunk.dictionary.to_pylist(), pc.value_counts(chunk.indices)
        for number, count in zip(counts.field("values"), counts.field("counts"), strict=True):
            found[names[number.as_py()]] += count.as_py()
    return found


def own_of(table: pa.Table) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    """Which lines' answers a student wrote, (n,) bool, and what these say of it, each once and in order."""
    chunks: list[npt.NDArray[np.bool_]] = []
    writers: set[str] = set()
    for chunk in table.column("written_by").chunks:
        names = chunk.dictionary.to_pylist()
        flags = np.array([is_students(name) for name in names], bool)
        used = np.asarray(chunk.indices)
        chunks.append(flags[used] if len(names) else np.zeros(len(used), bool))
        writers.update(names[place] for place in np.unique(used).tolist() if flags[place])
    return np.concatenate(chunks) if chunks else np.zeros(0, bool), tuple(sorted(writers))


def reasons_of(table: pa.Table) -> tuple[tuple[int, str], ...]:
    """(line, reason) of each row that cannot be used."""
    reasons = table.column("reason")
    lines = np.flatnonzero(reasons.is_valid().to_numpy())
    return tuple(zip(lines.tolist(), reasons.drop_null().to_pylist(), strict=True))


def picture_tokens_of(table: pa.Table, processor: ExampleProcessor) -> np.ndarray:
    """(n,) int64, about how many tokens the pictures of each line have; 0 where the header of one does not say."""
    pictures = table.column("pictures")
    flat = pictures.combine_chunks().flatten() if len(table) else pa.array([], SIZE)
    num_pictures = pc.list_value_length(pictures).to_numpy()
    widths, heights = (flat.field(name).to_numpy().astype(np.int64) for name in ("width", "height"))
    distinct, which = np.unique(widths << 32 | heights, return_inverse=True)  # 32 bits each
    sizes = zip((distinct >> 32).tolist(), (distinct & 0xFFFFFFFF).tolist(), strict=True)
    counts = np.array([processor.tokens_of_size(size) for size in sizes], np.int64)[which]
    lines = np.repeat(np.arange(len(table)), num_pictures)
    total = np.bincount(lines, np.maximum(counts, 0), len(table)).astype(np.int64)
    total[lines[counts == NO_TOKENS]] = 0
    return total
