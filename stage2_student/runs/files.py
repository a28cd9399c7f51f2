"""Small files of a run that are whole or absent, and the log that grows line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.cache.storage import sync_file, sync_folder
from shared.regular_files import naming, open_regular, read_regular
from shared.temporaries import remove_left, written_beside
from shared.vouched import opened, vouched


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, or a process killed here, sees the old text or the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As ``write_text``."""
    remove_left(path)
    with naming(path):
        with written_beside(path) as temporary, open(temporary, "wb") as file:
            file.write(data)
            sync_file(file)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_of_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """As JSON of the standard has it: null for NaN and infinity, words of Python's own that strict readers refuse."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def are_numbers(record: dict[str, Any], *names: str) -> bool:
    """Whether the record has a number under each of the names."""
    return all(type(record.get(name)) in (int, float) for name in names)


class JsonLines:
    """A log of one JSON object a line, each of which vouches for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def read(self) -> list[dict[str, Any]]:
        """All whole records; the last line may have been cut by a kill, and what is no object is no record."""
        return self._read()[0]

    def damaged(self) -> list[int]:
        """Numbers of lines, from 1, that hold no whole record, but for a last one that was cut."""
        return self._read()[1]

    def _read(self) -> tuple[list[dict[str, Any]], list[int]]:
        lines = []
        with suppress(FileNotFoundError):
            lines = read_regular(self.path).split(b"\n")
        found, damaged = [], []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(opened(json.loads(line)))
            except (ValueError, RecursionError):  # bytes that are not UTF-8 among them
                if number < len(lines):
                    damaged.append(number)
        return found, damaged

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the log without the records that are not wanted."""
        write_text(self.path, "".join(_line(record) for record in self.read() if wanted(record)))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(vouched(finite(record)), allow_nan=False) + "\n"
