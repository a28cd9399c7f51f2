"""The parts of a split: rows of one file that are looked at, and kept, together."""

from __future__ import annotations

from dataclasses import dataclass

from shared.data.data_files import DataFile
from shared.data.rows import VqaSplit

MOST_ROWS = 8192  # some ten seconds of a core
FEWEST_ROWS = 256
PARTS_OF_A_FILE = 16  # at least, where it has the rows: so many processes can share it


@dataclass(frozen=True)
class Part:
    """Rows [begin, end) of a file; ``first`` is the number that the first of them has in the split."""

    file: DataFile
    begin: int
    end: int
    first: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin

    @property
    def rows(self) -> range:
        """In the split."""
        return range(self.first, self.first + self.num_rows)


def parts_of(split: VqaSplit) -> list[Part]:
    """In the order of the split's rows.  Where a file is cut depends on that file alone."""
    found: list[Part] = []
    before = 0
    for file in split.rows.data_files():
        size = min(MOST_ROWS, max(FEWEST_ROWS, -(-file.num_rows // PARTS_OF_A_FILE)))
        used = min(file.num_rows, len(split) - before)
        for begin in range(0, used, size):
            found.append(Part(file, begin, min(begin + size, used), before + begin))
        before += file.num_rows
    return found
