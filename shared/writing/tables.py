"""Written answers as rows of Parquet, in the columns that the recipe names: ``data.source`` alone changes.

    schema = schema_of(split)
    data = encoded(split, entries, schema, ...)      # the bytes of a file

A row is its prompt's row with another last answer, in the form that the prompt's row has, and says beside it

    answer_ids, answer_end    the tokens, and whether the model ended them
    written_by                who wrote it, how and when: JSON
    source_key, source_row    the row that was asked: its key in hex, its number in its split
    draw                      which of the answers to its prompt, from 0
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from shared.data.conversations import Turn
from shared.data.rows import Example, VqaSplit
from shared.data.writable import question_of, system_of

ABOUT = b"teachonce"  # in a file's metadata
ROLE_KEYS = {
    "messages": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
    "conversations": ("from", "value", {"system": "system", "user": "human", "assistant": "gpt"}),
}
GROUP_BYTES = 16 * 2**20  # of a row group's pictures: readers keep whole groups in memory
MAX_GROUP = 256  # rows


def picture_column(split: VqaSplit) -> str | None:
    """Of questions and answers; None for rows of text alone.  Conversations bring their pictures themselves."""
    if split.settings.columns.image is None or "question_answer" not in split.forms:
        return None
    return split.pictures[0] if split.pictures else "images"


def _empty_columns(split: VqaSplit) -> list[str]:
    """Of pictures that a written conversation has among its turns, as it has a system's turn that stood beside them:
    the recipe may name the column all the same.
    """
    return [] if picture_column(split) else list(split.pictures[:1])


def schema_of(split: VqaSplit) -> pa.Schema:
    """Of the rows that are written for this split."""
    names = split.settings.columns
    text, picture = datasets.Value("string"), picture_column(split)
    features: dict[str, Any] = {}
    if picture is not None:
        features[picture] = datasets.List(datasets.Image())
    if "question_answer" in split.forms:
        features |= {names.question: text, names.answer: text}
    part = {"type": text, "text": text, "image": datasets.Image()}
    for form, (role, content, _) in ROLE_KEYS.items():
        if form in split.forms:
            features[getattr(names, form)] = datasets.List({role: text, content: datasets.List(part)})
    features |= {name: datasets.List(datasets.Image()) for name in _empty_columns(split)}
    features |= {split.columns[name]: text for name in ("kind", "case", "system") if name in split.columns}
    features |= {
        str(names.answer_ids): datasets.List(datasets.Value("int32")),
        str(names.answer_end): datasets.Value("bool"),
        str(names.written_by): text,
        "source_key": text,
        "source_row": datasets.Value("int64"),
        "draw": datasets.Value("int32"),
    }
    return datasets.Features(features).arrow_schema


def record(
    split: VqaSplit, example: Example, answer: str, ids: Sequence[int], *, is_whole: bool
) -> dict[str, Any]:
    """The prompt's row with another last answer; fields that say where it is from are the caller's."""
    names = split.settings.columns
    found: dict[str, Any] = {
        str(names.answer_ids): list(ids),
        str(names.answer_end): is_whole,
    }
    for name, value in (("kind", example.kind), ("case", example.case)):
        if name in split.columns:
            found[split.columns[name]] = value or None
    found |= {name: [] for name in _empty_columns(split)}
    if example.form == "question_answer":
        if (column := picture_column(split)) is not None:
            found[column] = [_picture(image) for image in example.images]
        if split.system_column is not None:
            found[split.system_column] = system_of(example)
        return found | {names.question: question_of(split, example), names.answer: answer}
    role, content, roles = ROLE_KEYS[example.form]
    pictures = iter(example.images)
    turns = [*example.turns[:-1], Turn("assistant", (answer,))]
    found[getattr(names, example.form)] = [
        {role: roles[turn.role], content: [_part(part, pictures) for part in turn.parts]} for turn in turns
    ]
    return found


def encoded(schema: pa.Schema, records: Iterator[dict[str, Any]], about: Mapping[str, Any]) -> pa.Buffer:
    """A Parquet file; pictures that rows share are held once in each group of rows.

    about  what the file says of itself, beside the rows
    """
    metadata = {**(schema.metadata or {}), ABOUT: json.dumps(about)}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, schema.with_metadata(metadata), compression="zstd", dictionary_pagesize_limit=1 << 30
    ) as writer:
        group: list[dict[str, Any]] = []
        num_bytes = 0
        for one in records:
            group.append(one)
            num_bytes += _picture_bytes(one)
            if num_bytes >= GROUP_BYTES or len(group) == MAX_GROUP:
                writer.write_table(pa.Table.from_pylist(group, writer.schema))
                group, num_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, writer.schema))
    return sink.getvalue()


def told_by(path: Path) -> dict[str, Any]:
    """What a file says of itself.  Raises   ValueError  when it is none of these"""
    try:
        told = json.loads((pq.read_schema(path).metadata or {})[ABOUT])
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no file of written answers ({error})") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path}: no file of written answers")
    return told


def _picture(image: bytes) -> dict[str, Any]:
    return {"bytes": image, "path": None}


def _part(part: str | None, pictures: Iterator[bytes]) -> dict[str, Any]:
    if part is None:
        return {"type": "image", "text": None, "image": _picture(next(pictures))}
    return {"type": "text", "text": part, "image": None}


def _picture_bytes(value: Any) -> int:
    """Of the pictures anywhere in a row."""
    if isinstance(value, bytes):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_picture_bytes, parts))
