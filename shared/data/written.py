"""Written answers laid over the rows that they answer: ``data.written``.

    laid = lay_over(split, [open_split(...) of each folder])
    laid.find(17)           # the set's own row that answers row 17, or None

A set of written answers says of each of its rows which row was asked (``source_row``), and that row's key at the time
(``source_key``).  The survey compares the keys, so answers to other prompts are never learned.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DataError

if TYPE_CHECKING:
    from shared.data.rows import VqaSplit

WRITTEN = "written.json"  # comes last: the set is whole
ASKED = ("source_row", "source_key")
NONE = -1


def told_writer(written_by: str) -> dict[str, Any]:
    """Who wrote an answer and how, as a written set's rows say it; empty for a text of another kind."""
    try:
        found = json.loads(written_by or "{}")
    except (ValueError, RecursionError):  # of another tool, or cut
        return {}
    return found if isinstance(found, dict) else {}


@functools.lru_cache(maxsize=1024)
def is_students(written_by: str) -> bool:
    """Whether a student wrote the answer; ``written_by`` as the row says it."""
    return told_writer(written_by).get("role") == "student"


@dataclass(frozen=True, eq=False)
class Written:
    """Which rows of a split have written answers.

    Shapes  set_N (N,) int64, of the row's answer among ``splits``, -1 where the row keeps its own
            row_N (N,) int64, in that set
            keys_N (N,) S16, that the row had when it was asked
    """

    splits: tuple[VqaSplit, ...]
    set_N: np.ndarray
    row_N: np.ndarray
    keys_N: np.ndarray

    @property
    def num_answers(self) -> int:
        return int((self.set_N != NONE).sum())

    def find(self, row: int) -> tuple[VqaSplit, int] | None:
        """The set of the row's answer, and its number there; None where the row keeps its own."""
        number = int(self.set_N[row])
        return None if number == NONE else (self.splits[number], int(self.row_N[row]))

    def lines(self, num_rows: int) -> np.ndarray:
        """(N,) int64: where each row is found if the sets' rows follow the split's own ``num_rows``."""
        before = np.cumsum([num_rows, *(len(one) for one in self.splits)])
        return np.where(self.set_N == NONE, np.arange(num_rows), before[self.set_N] + self.row_N)


def answers_in(folder: str, split: str) -> bool:
    """Whether a set of written answers has some to that split.

    Raises   DataError  when it is no finished set
    """
    path = Path(folder)
    if not (path / WRITTEN).is_file():
        raise DataError(
            f"data.written {folder}: no finished set of written answers (there is no {WRITTEN}). Name a folder that "
            "`train-student write` or `teacher-cache write` has finished"
        )
    # As a pattern of a shell, [ would stand for others, and train- also begin train-dev-.
    name = re.compile(re.escape(split) + r"-\d+-of-\d+\.parquet")
    files = sorted(file for file in path.iterdir() if name.fullmatch(file.name))
    try:
        return any(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError):  # whoever opens the rows says what is wrong
        return True


def lay_over(split: VqaSplit, sets: Sequence[VqaSplit]) -> Written:
    """Of several answers to a row the last one of the last set counts.

    Answers to rows beyond ``data.limit`` are left out, as the rows are.

    Raises   DataError  when a set answers rows that the split does not have, or does not say which
    """
    laid = Written(
        tuple(sets),
        set_N=np.full(len(split), NONE, np.int64),
        row_N=np.zeros(len(split), np.int64),
        keys_N=np.zeros(len(split), "S16"),
    )
    for number, one in enumerate(sets):
        asked_n, keys_n = _asked(one)
        row_n = np.flatnonzero(asked_n < (split.settings.limit or np.inf))
        asked_n, keys_n = asked_n[row_n], keys_n[row_n]
        if len(asked_n) and not 0 <= asked_n.min() <= asked_n.max() < len(split):
            raise DataError(
                f"data.written {one.source}: it answers row {asked_n.max()} of split {one.name}, and {split.source} "
                f"has {len(split)}. Name the set that was written for these data"
            )
        laid.set_N[asked_n] = number
        laid.row_N[asked_n] = row_n
        laid.keys_N[asked_n] = keys_n
    return laid


def _asked(one: VqaSplit) -> tuple[np.ndarray, np.ndarray]:
    """Number and key of the row that each row of a set answers, (n,) int64 and (n,) S16."""
    try:
        tables = [
            pq.read_table(file.path, columns=list(ASKED))
            for file in one.rows.data_files()
            if file.path is not None
        ]
        found = pa.concat_tables(tables)
        if found.column("source_row").null_count:
            raise ValueError("source_row is null")
        rows = found.column("source_row").to_numpy()
        keys = [bytes.fromhex(key) for key in found.column("source_key").to_pylist()]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"data.written {one.source}: it does not say which rows it answers ({error}). Write the answers again"
        ) from error
    return rows.astype(np.int64), np.array(keys, "S16")
