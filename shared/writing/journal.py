"""The answers of a unit that is not finished: one line a batch, on disk before the next batch begins.

    journal = Journal(folder / "train-00000.jsonl")
    journal.found                       # what a process before has written there
    journal.append([Entry(row=17, draw=0, ids=(4, 9), is_whole=True)])

A line vouches for itself.  One that was cut by a kill, or damaged since, is left out: its answers are written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.cache.storage import explain_write_errors
from shared.regular_files import read_regular
from shared.vouched import opened, vouched

REFUSED = -1  # in the place of a draw: the prompt could not be asked


@dataclass(frozen=True)
class Entry:
    """An answer, or why a row has none.

    row     its number over all splits
    draw    which of the answers to its prompt; ``REFUSED`` where it could not be asked
    """

    row: int
    draw: int
    ids: tuple[int, ...] = ()
    is_whole: bool = True
    reason: str = ""


def settled(found: Sequence[Entry], rows: Sequence[int], *, per_prompt: int) -> list[Entry] | None:
    """Of each row all of its answers, or why it has none; None where something of a row is missing.

    A row that could not be asked once and has its answers all the same is one with answers.
    """
    answers: dict[int, list[Entry]] = {row: [] for row in rows}
    refusals: dict[int, Entry] = {}
    for one in found:
        if one.draw == REFUSED:
            refusals[one.row] = one
        else:
            answers[one.row].append(one)
    kept: list[Entry] = []
    for row, some in answers.items():
        if len(some) < per_prompt and row not in refusals:
            return None
        kept += some if len(some) == per_prompt else [refusals[row]]
    return kept


class Journal:
    """The file of one unit, which one process at a time appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = _read(path)

    @property
    def done(self) -> set[tuple[int, int]]:
        return {(one.row, one.draw) for one in self.found}

    def append(self, entries: Sequence[Entry]) -> None:
        """On disk when it returns.

        Raises   CacheFormatError  when it cannot be written
        """
        line = json.dumps(vouched({"entries": [asdict(one) for one in entries]}), separators=(",", ":"))
        with explain_write_errors(f"written set {self.path.parent.parent}", self.path.name):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(f"\n{line}\n".encode())  # apart from a line that a kill has cut
                file.flush()
                os.fsync(file.fileno())
        self.found += entries

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> list[Entry]:
    try:
        lines = read_regular(path).splitlines()
    except FileNotFoundError:
        return []
    found: dict[tuple[int, int], Entry] = {}
    for line in lines:
        try:
            entries = [_entry(one) for one in opened(json.loads(line))["entries"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        found |= {(one.row, one.draw): one for one in entries}
    return list(found.values())


def _entry(read: dict[str, object]) -> Entry:
    ids = read.pop("ids")
    if not isinstance(ids, list):
        raise TypeError("ids")
    return Entry(**read, ids=tuple(ids))  # type: ignore[arg-type]  # the line's digest vouches for the types
