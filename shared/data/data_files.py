"""The files of a data set, by content: what was found in one of them holds as long as its content is the same.

    files = split.rows.data_files()
    files[0].content()          # hex

A small file is hashed whole.  Of a large one its head, its end and the footer that describes it are, beside its size
and times: a write in its middle leaves the times changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.data.copies import Stamp
from shared.data.fingerprints import digest, sha256_hex
from shared.regular_files import open_regular

WHOLE_BYTES = 4 * 2**20  # hashed whole up to here
END_BYTES = 256 * 2**10
MAX_FOOTER_BYTES = 64 * 2**20
_FOOTERS = {
    b"PAR1": 4,
    b"ARROW1": 6,
}  # an Arrow or Parquet file ends in its footer, that one's length and a word


@dataclass(frozen=True)
class DataFile:
    """A file as it was opened, and how many rows it has.

    path, stamp  None for a data set whose files are not known
    fingerprint  of such a data set, where it has one
    """

    path: Path | None
    num_rows: int
    stamp: Stamp | None = None
    fingerprint: str | None = None

    def content(self) -> str | None:
        """Hex, another one when the content may be another; None where nothing tells, or the file has changed."""
        if self.path is None:
            return None if self.fingerprint is None else digest(["data set", self.fingerprint])
        try:
            with open_regular(self.path) as stream:
                found = _content(stream)
        except OSError:  # whoever reads its rows says so
            return None
        return found if self.is_unchanged() else None

    def is_unchanged(self) -> bool:
        """Whether it still is what was opened, as far as is known."""
        try:
            return self.path is None or (self.stamp is not None and self.stamp.matches(Stamp.of(self.path)))
        except OSError:
            return False


def _content(stream: IO[bytes]) -> str:
    stamp = Stamp.of_status(os.fstat(stream.fileno()))
    size = stamp.num_bytes
    if size <= WHOLE_BYTES:
        return digest([size, sha256_hex(stream.read())])
    end = max(END_BYTES, min(_footer_bytes(stream, size), MAX_FOOTER_BYTES))
    hashes = [sha256_hex(_at(stream, 0, END_BYTES)), sha256_hex(_at(stream, max(size - end, 0), end))]
    return digest([size, hashes, stamp.modified_ns, stamp.changed_ns])


def _footer_bytes(stream: IO[bytes], size: int) -> int:
    """With its length and its word; 0 where there is none."""
    for word, length in _FOOTERS.items():
        if _at(stream, size - length, length) == word:
            return int.from_bytes(_at(stream, size - length - 4, 4), "little") + 4 + length
    return 0


def _at(stream: IO[bytes], place: int, length: int) -> bytes:
    stream.seek(place)
    return stream.read(length)
