"""The examples: rows of a VQA data set, checked one by one as they are read.

    train = open_split(recipe.data, "train")
    example = train[0]      # Example(image=b"\\xff\\xd8...", question="Which plane?", answer="Axial", ...)

Pictures stay encoded here (``shared.data.images`` decodes them), since their bytes are part of an example's
identity.  Texts are trimmed at the ends and otherwise left as they are; one without a visible
character is none.  A row that cannot be used raises
``DataError`` with its split and number; whoever reads decides whether it may be left out, and counts it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.data.sources import Rows, choose, open_rows
from shared.errors import DataError, NotAFileError, shortened
from shared.recipes import DataConfig, Split
from shared.regular_files import read_regular

BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # Hangul fillers, an empty Braille cell
MAX_PATH = 4096  # characters; a longer text is none


@dataclass(frozen=True)
class Example:
    """One row: an encoded picture file, a question, its answer, where they come from."""

    image: bytes
    question: str
    answer: str
    kind: str  # where the question comes from, or "": results are reported by it
    case: str  # or ""
    index: int  # the row in its split
    where: str = field(default="", compare=False)  # how messages name it


@dataclass(frozen=True)
class VqaSplit:
    """A split of a VQA data set; memory-mapped, so cheap to open and to send to data-loader workers."""

    source: str
    name: str
    rows: Rows
    columns: dict[str, str]  # field of an Example -> column, for those that the data set has
    num_examples: int

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Raises   DataError  when the row has no usable picture, question or answer."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"row {index} of a split of {self.num_examples}")
        where = self.where(index)
        row = self.rows[index]
        value = {field: row.get(column) for field, column in self.columns.items()}
        return Example(
            image=_picture(value["image"], self.rows.folder_of(index), where=where),
            question=_text(value["question"], "question", where=where),
            answer=_text(value["answer"], "answer", where=where),
            kind=_label(value.get("kind")),
            case=_label(value.get("case")),
            index=index,
            where=where,
        )

    def where(self, index: int) -> str:
        """How messages name a row."""
        return f"{self.source}, split {self.name}, row {index}"


def open_split(data: DataConfig, split: Split) -> VqaSplit:
    """Opens the train, validation or test split of ``data``, its first ``data.limit`` rows if that is set.

    Raises   DataError  when the source, the split or a column is missing, or the split has no rows.
    """
    name = getattr(data.splits, split)
    if name is None:
        raise DataError(f"data.splits.{split} is null: {data.source} is said to have no {split} split")
    others = [other for other in data.splits.model_dump().values() if other is not None]
    rows = open_rows(data.source, split=name, revision=data.revision, splits=others)
    if len(rows) == 0:
        raise DataError(f"{data.source}, split {name}: no rows; at least one is needed")
    columns = _columns(data, rows)
    rows = rows.select(sorted(set(columns.values())))
    return VqaSplit(data.source, name, rows, columns, min(len(rows), data.limit or len(rows)))


def _columns(data: DataConfig, rows: Rows) -> dict[str, str]:
    """The column of each field; MedPix's ``mode`` and ``case_id`` may be missing unless asked for by name."""
    columns, problems = {}, []
    for name, column in data.columns.model_dump().items():
        optional = name in ("kind", "case") and name not in data.columns.model_fields_set
        if column is None or (optional and column not in rows.columns):
            continue
        try:
            choose(column, rows.columns, what=f"{data.source}: data.columns.{name}: column")
        except DataError as error:
            problems.append(str(error))
        columns[name] = column
    if problems:
        raise DataError("\n".join(problems))
    return columns


def _picture(value: Any, folder: Path | None, *, where: str) -> bytes:
    """The encoded file, from bytes, a path, or the ``{"bytes", "path"}`` of a ``datasets`` picture."""
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise DataError(f"{where}: the picture is missing (null)")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "://" in value:
        found = "a URL" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{where}: the picture is {found}; needed are encoded bytes or the path of a file")
    if len(value) > MAX_PATH:
        raise DataError(
            f"{where}: the picture is a text of {len(value):,} characters, {shortened(value)!r}, and no path; needed "
            "are encoded bytes or the path of a file. Decode base64 before you save it"
        )
    path = (folder or Path()) / value
    try:
        return read_regular(path)
    except NotAFileError as error:
        raise DataError(f"{where}: the picture {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise DataError(f"{where}: the picture {shortened(str(path))} cannot be read ({reason})") from error


def _text(value: Any, what: str, *, where: str) -> str:
    """A question or an answer, trimmed at the ends; a number is written out."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: the {what} is missing (null)")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the {what} is a {type(value).__name__}; needed is one text")
    text = value.strip()
    if not text:
        raise DataError(f"{where}: the {what} is empty")
    if not any(_is_visible(character) for character in text):
        shown = ascii(text[:20])
        raise DataError(f"{where}: the {what} has no visible character, only {shown}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the {what} is not valid Unicode ({error})") from error
    return text


def _is_visible(character: str) -> bool:
    """Not a space, a control or a format character, nor a letter that is blank by definition."""
    return character not in BLANK_LETTERS and unicodedata.category(character)[0] not in "ZC"


def _label(value: Any) -> str:
    return "" if value is None else str(value)
