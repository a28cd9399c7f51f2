"""Small files of a run that are whole or absent, and the log that grows line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.regular_files import read_regular


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, or a process killed here, sees the old text or the new."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_objects(log: bytes) -> list[dict[str, Any]]:
    """Those of its lines that are a JSON object; the others are passed over."""
    found = []
    for line in log.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 among them
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def are_numbers(record: dict[str, Any], *names: str) -> bool:
    """Whether the record has a number under each of the names."""
    return all(type(record.get(name)) in (int, float) for name in names)


class JsonLines:
    """A log of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole records; the last line may have been cut by a kill, and what is no object is no record."""
        if not self.path.exists():
            return []
        return json_objects(read_regular(self.path))

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the log without the records that are not wanted."""
        text = "".join(json.dumps(record) + "\n" for record in self.read() if wanted(record))
        write_text(self.path, text)
