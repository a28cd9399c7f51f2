"""Opens the rows of one split, wherever they are kept: Hub, Parquet, Arrow, JSONL.

    rows = open_rows("work/phantom/data", split="validation")
    rows.columns, len(rows), rows[17]["question"]

A source is, in this order: a folder that ``datasets.save_to_disk`` wrote; a file, or a folder of files, of
one kind (Parquet before Arrow before JSONL); else a name on the Hugging Face Hub.  Files are read where they
lie; of JSONL only the place of each line is held.

A file belongs to the split that its name says, as it stands (``train2017.jsonl``) or without shard numbers
(``train-00000-of-00002.parquet``), or else the innermost folder that is called so
(``train/part-0.parquet``).  A source of a single file also answers to ``train``.  Files that are numbered as
parts of a whole (``-00000-of-00003``) must all be there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from shared.data.tables import TableRows
from shared.errors import DataError, NotAFileError, shortened
from shared.places import require_hub_asked_once, require_no_typo, why
from shared.regular_files import open_regular, refuse_irregular, refuse_irregular_members

_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl"}  # in order of preference
_SHARD_NUMBERS = re.compile(
    r"[-_.]?\d+([-_]of[-_]\d+(-[0-9a-f]{10,})?)?$"
)  # older files on the Hub end in a hash
MAX_NAMES = 20  # told in a message
MAX_PARTS = 1_000_000  # of a split; a name that says more is not worth counting through
_SHARD_OF = re.compile(r"^(.*?)[-_.]?(\d+)[-_]of[-_](\d+)(?:-[0-9a-f]{10,})?$")


class Rows(Protocol):
    """Rows of named columns; cheap to pickle, safe to read from many processes."""

    def folder_of(self, index: int) -> Path | None: ...  # where a row's relative picture path starts

    def select(self, columns: Sequence[str]) -> Rows: ...  # the others need not be read

    @property
    def columns(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a memory-mapped ``datasets.Dataset``; pictures stay encoded, classes have their names."""

    dataset: datasets.Dataset
    folder: Path | None

    def folder_of(self, index: int) -> Path | None:
        return self.folder

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        for name, feature in self.dataset.features.items():
            if isinstance(feature, datasets.ClassLabel) and isinstance(row[name], int):
                row[name] = feature.int2str(row[name]) if row[name] >= 0 else None
        return row

    def select(self, columns: Sequence[str]) -> DatasetRows:
        dataset = self.dataset.select_columns(list(columns))
        for name in columns:
            if isinstance(dataset.features[name], datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        return DatasetRows(dataset, self.folder)


class JsonLinesRows:
    """Rows of JSONL files, parsed one at a time: types as the file has them, not guessed from a column."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._columns: dict[str, None] = {}  # an ordered set
        places = (
            place for number, file in enumerate(files) for place in _line_places(number, file, self._columns)
        )
        self._places = np.fromiter(places, dtype=np.dtype((np.int64, 4)))  # file, line, first byte, length
        if len(self) and not self._columns:
            try:
                self[0]
            except DataError as error:
                raise DataError(f"none of {len(self)} line(s) can be read; the first: {error}") from error

    def folder_of(self, index: int) -> Path | None:
        return self._files[int(self._places[index][0])].parent

    def select(self, columns: Sequence[str]) -> JsonLinesRows:
        return self  # a line is parsed whole

    @property
    def columns(self) -> list[str]:
        """All keys of all rows: one without an optional key, or that cannot be read, says nothing of others."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, line, start, length = (int(value) for value in self._places[index])
        with open_regular(self._files[file]) as stream:
            stream.seek(start)
            data = stream.read(length)
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._files[file]}, line {line}: not JSON ({error})") from error
        if not isinstance(row, dict):
            found = type(row).__name__
            raise DataError(f"{self._files[file]}, line {line}: a {found}; each line must be one JSON object")
        return row


def open_rows(source: str, *, split: str, revision: str | None = None, splits: Iterable[str] = ()) -> Rows:
    """The rows of ``split``, the name that the source itself uses; ``splits`` are the other names in use.

    Raises   DataError  when the source is missing, unreadable or unreachable, or has no such split.
    """
    path = Path(source)
    require_no_typo(source, what=f"data.source {source}", error=DataError)
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return DatasetRows(_saved_to_disk(path, split), path)
        if path.exists():
            return _open_files(path, split, {split, *splits})
        require_hub_asked_once()
        return DatasetRows(datasets.load_dataset(source, revision=revision, split=split), None)
    except DataError:
        raise
    except NotAFileError as error:
        raise DataError(f"data.source {source}: {error}") from error
    except Exception as error:  # datasets raises errors of a dozen libraries
        reason = shortened(why(source, error))
        raise DataError(f"split {split!r} of data.source {source}: cannot be opened: {reason}") from error


def choose(wanted: str, found: Iterable[str], *, what: str) -> None:
    """Raises DataError with the list and the nearest name, unless ``wanted`` is among those found."""
    names = sorted(set(found))
    if wanted in names:
        return
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    found_text = ", ".join(map(shortened, names[:MAX_NAMES])) or "none"
    raise DataError(f"{what} {wanted!r} is not there; found {found_text}{more}{hint}")


def _open_files(path: Path, split: str, splits: set[str]) -> Rows:
    kind, files = _data_files(path)
    names = {file: _split_names(file, path) for file in files}
    members = [file for file in files if next((n for n in names[file] if n in splits), None) == split]
    if not members:
        choose(
            split, [_SHARD_NUMBERS.sub("", file.stem) for file in files], what=f"data.source {path}: split"
        )
    _require_all_parts(members)
    if kind == "jsonl":
        return JsonLinesRows(members)
    return TableRows.open(members, folder=path if path.is_dir() else path.parent)


def _require_all_parts(files: Sequence[Path]) -> None:
    """Raises   DataError  when files say in their names how many there are, and some are missing"""
    parts: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if found := _SHARD_OF.match(file.stem):
            name, number, total = found[1], int(found[2]), int(found[3])
            parts.setdefault((file.parent, name, total), set()).add(number)
    for (folder, name, total), numbers in parts.items():
        first = 0 if 0 in numbers or total not in numbers else 1  # some count from one
        missing = [number for number in range(first, first + min(total, MAX_PARTS)) if number not in numbers]
        if missing or len(numbers) != total:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"{folder / (name or '.')}: {len(numbers)} of {total} parts are there; number {some} is missing. "
                "Fetch the rest, or rename the files if they are all there is"
            )
    totals = {(folder, name): total for folder, name, total in parts}
    for folder, name, total in parts:
        if totals[folder, name] != total:
            both = f"{min(total, totals[folder, name])} and {max(total, totals[folder, name])}"
            raise DataError(
                f"{folder / name}: parts of two sets, of {both} files, lie together. Remove one set"
            )


def _data_files(path: Path) -> tuple[str, list[Path]]:
    found = sorted(file for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else [path]
    visible = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    for suffix, kind in _KINDS.items():
        if files := [file for file in visible if file.suffix == suffix]:
            for file in files:
                refuse_irregular(file)
            return kind, files
    raise DataError(
        f"data.source {path}: no data file; needed {', '.join('*' + suffix for suffix in _KINDS)}"
    )


def _split_names(file: Path, source: Path) -> list[str]:
    """What a file's split may be called, the likeliest first."""
    folders = file.relative_to(source).parts[-2::-1]
    names = dict.fromkeys((file.stem, _SHARD_NUMBERS.sub("", file.stem), *folders))
    return [name for name in names if name] + (["train"] if file == source else [])


def _saved_to_disk(path: Path, split: str) -> datasets.Dataset:
    for folder in (path, *(member for member in path.iterdir() if member.is_dir())):
        refuse_irregular_members(folder)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({"train": saved})
    choose(split, saved, what=f"data.source {path}: split")
    return saved[split]


def _line_places(number: int, file: Path, columns: dict[str, None]) -> Iterable[tuple[int, int, int, int]]:
    """The file's number, then number, first byte and length of each line that is not blank; adds its keys.

    Each line is parsed for that: 200,000 of 300 bytes take 0.55 s in place of 0.1.  Parsing only those with a
    colon that is not behind a known key took 0.35 s, and 0.75 where answers have colons.
    """
    start = 0
    with open_regular(file) as stream:
        for line_number, line in enumerate(stream, start=1):
            if line.strip():
                columns.update(dict.fromkeys(_keys(line)))
                yield number, line_number, start, len(line)
            start += len(line)


def _keys(line: bytes) -> Iterable[str]:
    """None of a line that is no JSON object: it is refused by its number when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return row if isinstance(row, dict) else ()
