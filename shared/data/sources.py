"""Opens the rows of one split, wherever they are kept: Hub, Parquet, Arrow, JSONL, JSON.

    rows = open_rows("work/phantom/data", split="validation")
    rows.columns, len(rows), rows[17]["question"]

A source is, in this order: a folder that ``datasets.save_to_disk`` wrote; a file, or a folder of files, each split
of one kind (Parquet before Arrow before JSONL before JSON); else a name on the Hugging Face Hub.  Files are read
where they lie; compressed JSONL and lists of objects from a local copy.

A file belongs to the split that its name says, as it stands (``train2017.jsonl``) or without shard numbers
(``train-00000-of-00002.parquet``), or else the innermost folder that is called so
(``train/part-0.parquet``).  A source of a single file also answers to ``train``.  Files that are numbered as
parts of a whole (``-00000-of-00003``) must all be there.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from shared.data.data_files import DataFile
from shared.data.features import as_values, described_columns
from shared.data.json_rows import SUFFIXES as JSON_SUFFIXES
from shared.data.json_rows import JsonRows
from shared.data.tables import TableRows
from shared.errors import DataError, NotAFileError, TeachonceError, shortened
from shared.places import require_hub_asked_once, require_no_typo, why
from shared.regular_files import read_regular, refuse_irregular, refuse_irregular_members

_KINDS = (
    (".parquet",),
    (".arrow",),
    (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    (".json",),
)  # in order of preference
_SHARD_NUMBERS = re.compile(
    r"[-_.]?\d+([-_]of[-_]\d+(-[0-9a-f]{10,})?)?$"
)  # older files on the Hub end in a hash
MAX_NAMES = 20  # told in a message
MAX_LINKS = 1_000  # to folders, in a source
MAX_PARTS = 1_000_000  # of a split; a name that says more is not worth counting through
CARD = "README.md"
MAX_CARD = 2**20
_FRONT_MATTER = re.compile(r"---\r?\n.*?\n---", re.DOTALL)
_CONFIG_NAME = re.compile(r"^[ \t-]*config_name:[ \t]*[\"']?([^\s\"'][^\n\r\"']*)", re.MULTILINE)
_SHARD_OF = re.compile(r"^(.*?)[-_.]?(\d+)[-_]of[-_](\d+)(?:-[0-9a-f]{10,})?$")


class Rows(Protocol):
    """Rows of named columns; cheap to pickle, safe to read from many processes."""

    def folder_of(self, index: int) -> Path | None: ...  # where a row's relative picture path starts

    def select(self, columns: Sequence[str]) -> Rows: ...  # the others need not be read

    def data_files(self) -> list[DataFile]: ...  # in the order of their rows

    @property
    def columns(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a memory-mapped ``datasets.Dataset``; pictures stay encoded, classes have their names.

    Cells are read as they are stored.  To cast pictures to encoded ones would write the whole set once more.

    fingerprint  of the data set as it was opened, whatever columns are used of it
    """

    dataset: datasets.Dataset
    folder: Path | None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", self.dataset.with_format("arrow"))

    def folder_of(self, index: int) -> Path | None:
        return self.folder

    def data_files(self) -> list[DataFile]:
        return [DataFile(None, len(self), fingerprint=self.fingerprint)]

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        table = self.dataset[index]
        return as_values(table.to_pylist()[0], table.schema, self._described)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return described_columns(self.dataset.features.to_dict())

    def select(self, columns: Sequence[str]) -> DatasetRows:
        return replace(self, dataset=self.dataset.select_columns(list(columns)))


def open_rows(
    source: str,
    *,
    split: str,
    revision: str | None = None,
    config: str | None = None,
    splits: Iterable[str] = (),
) -> Rows:
    """The rows of ``split``, the name that the source itself uses; ``splits`` are the other names in use.

    revision, config  of a data set on the Hub

    Raises   DataError  when the source is missing, unreadable or unreachable, or has no such split.
    """
    path = Path(source)
    require_no_typo(source, what=f"data.source {source}", error=DataError)
    if config is not None and path.exists():
        raise DataError(
            f"data.config {config}: {source} is no data set of the Hub. Set it to null, and give the folder of one "
            "configuration as data.source"
        )
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return TableRows.open(_saved_files(path, split), folder=path)
        if path.exists():
            return _open_files(path, split, {split, *splits})
        require_hub_asked_once()
        found = datasets.load_dataset(source, config, revision=revision, split=split)
        return DatasetRows(found, None, fingerprint=getattr(found, "_fingerprint", None))
    except NotAFileError as error:
        raise DataError(f"data.source {source}: {error}") from error
    except TeachonceError:
        raise
    except Exception as error:  # datasets raises errors of a dozen libraries
        reason = shortened(why(source, error))
        remedy = ". Name one as data.config" if "Config name is missing" in str(error) else ""
        raise DataError(
            f"split {split!r} of data.source {source}: cannot be opened: {reason}{remedy}"
        ) from error


def choose(wanted: str, found: Iterable[str], *, what: str, remedy: str = "") -> None:
    """Raises DataError with the list, the nearest name and the remedy, unless ``wanted`` is among those found."""
    names = sorted(set(found))
    if wanted in names:
        return
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "." if remedy else ""
    more = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    found_text = ", ".join(map(shortened, names[:MAX_NAMES])) or "none"
    raise DataError(f"{what} {wanted!r} is not there; found {found_text}{more}{hint} {remedy}".rstrip())


def _open_files(path: Path, split: str, splits: set[str]) -> Rows:
    kinds = _data_files(path)
    found = ([file for file in files if _belongs(file, path, split, splits)] for files in kinds)
    members = next((files for files in found if files), [])
    if not members:
        stems = [_stem(file) for files in kinds for file in files]
        _choose_split(split, [_SHARD_NUMBERS.sub("", stem) or stem for stem in stems], path)
    for file in members:
        refuse_irregular(file)
    _require_all_parts(members)
    _require_one_config(path, members)
    if members[0].name.endswith(JSON_SUFFIXES):
        return JsonRows(members)
    return TableRows.open(members, folder=path if path.is_dir() else path.parent)


def _choose_split(split: str, found: Iterable[str], path: Path) -> None:
    remedy = "Set data.splits to the names that the source uses, and to null for a split that it lacks"
    choose(split, found, what=f"data.source {path}: split", remedy=remedy)


def _require_all_parts(files: Sequence[Path]) -> None:
    """Raises   DataError  when files say in their names how many there are, and some are missing"""
    parts: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if found := _SHARD_OF.match(_stem(file)):
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


def _require_one_config(path: Path, files: Sequence[Path]) -> None:
    """Raises   DataError  when a data set's card names several configurations, and several folders are meant"""
    folders = sorted({str(file.parent.relative_to(path)) for file in files}) if path.is_dir() else []
    card = path / CARD
    if len(folders) < 2 or not card.is_file():
        return
    found = _FRONT_MATTER.match(read_regular(card)[:MAX_CARD].decode(errors="replace"))
    configs = sorted(set(_CONFIG_NAME.findall(found[0]))) if found else []
    if len(configs) > 1:
        raise DataError(
            f"data.source {path}: {CARD} names the configurations {shortened(', '.join(configs))}, and their rows "
            f"lie in {shortened(', '.join(folders))}. Give the folder of one of them"
        )


def _stem(file: Path) -> str:
    """Its name without what says its kind."""
    return re.sub(r"\.jsonl\.(gz|zst)$", "", file.name) if file.suffix in (".gz", ".zst") else file.stem


def _data_files(path: Path) -> list[list[Path]]:
    """Those of each kind that is there, the preferred one first."""
    visible = sorted(_files_below(path)) if path.is_dir() else [path]
    kinds = [[file for file in visible if file.name.endswith(suffixes)] for suffixes in _KINDS]
    if any(kinds):
        return [files for files in kinds if files]
    needed = ", ".join(f"*{suffix}" for suffixes in _KINDS for suffix in suffixes)
    raise DataError(f"data.source {path}: no data file; needed {needed}")


def _files_below(source: Path) -> Iterator[Path]:
    """All files but hidden ones, links to folders followed.

    Raises   OSError    naming a folder that cannot be read: its rows would be missing without a word
             DataError  for more links than a data set has: a few can stand for millions of folders
    """
    pending, num_links = [(source, frozenset[tuple[int, int]]())], 0
    while pending:
        folder, above = pending.pop()
        above |= {_identity(folder)}
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "lost+found":  # of a disk
                continue
            path = folder / entry.name
            if not path.is_dir():
                yield path
            elif not entry.is_symlink():
                pending.append((path, above))
            elif _identity(path) not in above:  # or it leads to a folder that it lies in
                num_links += 1
                if num_links > MAX_LINKS:
                    raise DataError(
                        f"data.source {source}: more than {MAX_LINKS:,} links to folders; name the one with the data"
                    )
                pending.append((path, above))


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _belongs(file: Path, source: Path, split: str, splits: set[str]) -> bool:
    return next((name for name in _split_names(file, source) if name in splits), None) == split


def _split_names(file: Path, source: Path) -> list[str]:
    """What a file's split may be called, the likeliest first."""
    folders = file.relative_to(source).parts[-2::-1]
    names = dict.fromkeys((_stem(file), _SHARD_NUMBERS.sub("", _stem(file)), *folders))
    return [name for name in names if name] + (["train"] if file == source else [])


def _saved_files(path: Path, split: str) -> list[Path]:
    """Files of a split that the library ``datasets`` saved, in the order of their rows.

    Raises   DataError  when there is no such split, or the folder's description is damaged
    """
    for folder in (path, *(member for member in path.iterdir() if member.is_dir())):
        refuse_irregular_members(folder)
    splits = {"train": path}
    if (path / "dataset_dict.json").exists():
        splits = {name: path / name for name in _saved_json(path / "dataset_dict.json", "splits")}
    _choose_split(split, splits, path)
    folder = splits[split]
    names = [one.get("filename") for one in _saved_json(folder / "state.json", "_data_files")]
    return [folder / name for name in names if isinstance(name, str)]


def _saved_json(file: Path, name: str) -> list[Any]:
    try:
        found = json.loads(read_regular(file))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); save the data set again") from error
    if not isinstance(found, list):
        raise DataError(f"{file}: {name} is a {type(found).__name__}, not a list; save the data set again")
    return found
