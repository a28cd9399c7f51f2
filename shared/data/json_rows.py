"""Rows of JSON files, parsed one at a time: types as the file has them, not guessed from a column.

    rows = JsonRows([Path("train.jsonl"), Path("more.jsonl.zst"), Path("train.json")])

Of a file with one object a line only the place of each line is held.  A compressed file is unpacked once, and a file
that is one list of objects is written once with an object a line, both into the folder of copies; memory does not
grow with the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from shared.data.copies import Stamp, kept_copy, mark_used, require_unchanged
from shared.data.data_files import DataFile
from shared.errors import DataError, FileError
from shared.regular_files import open_regular

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")
MAX_OBJECT = 256 * 2**20  # characters of one object of a list
ONE_A_LINE = "Needed is one object a line, or in a .json file one list of objects"
_CHUNK = 2**20
_ZSTD_CHUNK = 2**10  # compressed; a kilobyte unfolds to some 32 MiB at most
_BLANK = b" \t\r\n"
_BLANKS = re.compile(r"[ \t\r\n]*")


class JsonRows:
    """Rows of files; cheap to pickle."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._stamps = tuple(map(Stamp.of, files))
        self._opened = list(map(_as_lines, files, self._stamps))
        self._columns: dict[str, None] = {}  # an ordered set
        places = (
            place
            for number, file in enumerate(self._opened)
            for place in _line_places(number, file, self._columns)
        )
        self._places = np.fromiter(places, dtype=np.dtype((np.int64, 4)))  # file, line, first byte, length
        if len(self) and not self._columns:
            try:
                self[0]
            except DataError as error:
                raise DataError(
                    f"none of {len(self)} line(s) can be read; the first: {error}. {ONE_A_LINE}"
                ) from error

    def folder_of(self, index: int) -> Path | None:
        return self._files[int(self._places[index][0])].parent

    def data_files(self) -> list[DataFile]:
        sizes = np.bincount(self._places[:, 0], minlength=len(self._files))
        found = zip(self._files, sizes.tolist(), self._stamps, strict=True)
        return [DataFile(file, num_rows, stamp) for file, num_rows, stamp in found]

    def select(self, columns: Sequence[str]) -> JsonRows:
        return self  # an object is parsed whole

    @property
    def columns(self) -> list[str]:
        """All keys of all rows: one without an optional key, or that cannot be read, says nothing of others."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises   DataError  when the row is no JSON object
        FileError  when its file cannot be read at all, or has changed: no fault of the row
        """
        file, line, start, length = (int(value) for value in self._places[index])
        data = self._read(file, start, length)
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            if not self._is_copied(file):
                require_unchanged(self._files[file], self._stamps[file])
            raise DataError(f"{self._where(file, line)}: not JSON ({error})") from error
        if not isinstance(row, dict):
            found = type(row).__name__
            raise DataError(f"{self._where(file, line)}: a {found}; each must be one JSON object")
        return row

    def _read(self, file: int, start: int, length: int) -> bytes:
        """A copy that is gone, or of another machine, is made again; places in it are the same."""
        if self._is_copied(file):
            mark_used(self._opened[file])
            with contextlib.suppress(OSError):
                return _bytes_at(self._opened[file], start, length)
            require_unchanged(self._files[file], self._stamps[file])
            self._opened[file] = _as_lines(self._files[file], self._stamps[file])
        try:
            return _bytes_at(self._opened[file], start, length)
        except OSError as error:
            require_unchanged(self._files[file], self._stamps[file])
            raise FileError(f"{self._opened[file]}: cannot be read ({error.strerror or error})") from error

    def _is_copied(self, file: int) -> bool:
        return self._opened[file] != self._files[file]

    def _where(self, file: int, line: int) -> str:
        return f"{self._files[file]}, {'element' if _is_list(self._files[file]) else 'line'} {line}"


def _bytes_at(file: Path, start: int, length: int) -> bytes:
    with open_regular(file) as stream:
        stream.seek(start)
        return stream.read(length)


def _is_list(file: Path) -> bool:
    """Whether a ``.json`` file is one list: many hold an object a line all the same."""
    return file.suffix == ".json" and _head(file).startswith(b"[")


def _head(file: Path) -> bytes:
    with open_regular(file) as stream:
        return stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)


def _refuse_spread_object(file: Path) -> None:
    """Raises   DataError  when a ``.json`` file is one object of several lines, as where its rows lie under a name"""
    head = _head(file).decode(errors="replace")
    try:
        end = json.JSONDecoder().raw_decode(head)[1]
    except json.JSONDecodeError as error:
        end = error.pos
    except RecursionError:
        return
    if not head.startswith("{") or end <= len(head.partition("\n")[0]):
        return
    named = re.search(r'"([^"\\]{1,64})"\s*:\s*\[\s*\{', head)
    remedy = f" Save the list under {named[1]!r} alone" if named else ""
    raise DataError(f"{file}: an object that goes over several lines. {ONE_A_LINE}.{remedy}")


def _as_lines(file: Path, stamp: Stamp) -> Path:
    """The file, or its copy with an object a line.

    Raises   DataError  when it is damaged; FileError when no copy can be written, or the file changes meanwhile
    """
    if file.name.endswith(".jsonl.gz"):
        chunks = _of_gzip
    elif file.name.endswith(".jsonl.zst"):
        chunks = _of_zstd
    elif _is_list(file):
        chunks = _of_list
    else:
        if file.suffix == ".json":
            _refuse_spread_object(file)
        return file

    def write(part: Path) -> None:
        with open_regular(file) as source, open(part, "wb") as sink:
            for chunk in chunks(source, file):
                sink.write(chunk)
        require_unchanged(file, stamp)

    remedy = "Make room, set TEACHONCE_COPIES to another folder, or write the rows as plain .jsonl"
    return kept_copy(file, stamp, ".jsonl", write=write, remedy=remedy)


def _of_gzip(source: IO[bytes], file: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=source) as unpacked:
            while chunk := unpacked.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: cannot be unpacked ({error}); the file is damaged or was cut") from error


def _of_zstd(source: IO[bytes], file: Path) -> Iterator[bytes]:
    """One frame after the other; a stream reader would take a frame that was cut for a shorter one."""
    unpacker = None
    try:
        while packed := source.read(_ZSTD_CHUNK):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                yield unpacker.decompress(packed)
                packed = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise DataError(f"{file}: cannot be unpacked ({error}); the file is damaged") from error
    if unpacker is not None:
        raise DataError(f"{file}: cannot be unpacked: its last frame has no end; the file was cut")


def _of_list(source: IO[bytes], file: Path) -> Iterator[bytes]:
    """The elements of a list, one a line; what is no object is refused by its number when it is read."""
    text = _Buffered(source, file)
    decoder = json.JSONDecoder()
    text.skip("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.skip(",")
        number += 1
        element = text.element(decoder, number)
        yield json.dumps(element, ensure_ascii=True).encode() + b"\n"
    text.skip("]")
    if text.peek():
        raise DataError(f"{file}: something follows the list; one list of objects is needed")


class _Buffered:
    """Text that is read as far as it is needed."""

    def __init__(self, source: IO[bytes], file: Path) -> None:
        self._reader = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
        self._file, self._text, self._place, self._is_whole = file, "", 0, False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self._place = _BLANKS.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def skip(self, expected: str) -> None:
        if (found := self.peek()) != expected:
            shown = repr(found) if found else "the end of the file"
            raise DataError(
                f"{self._file}: found {shown}, needed {expected!r}; the list of objects is damaged"
            )
        self._place += 1

    def element(self, decoder: json.JSONDecoder, number: int) -> Any:
        self.peek()
        while True:
            try:
                element, end = decoder.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                is_long = len(self._text) > MAX_OBJECT
                if is_long or isinstance(error, RecursionError) or not self._more():
                    size = f"no object of at most {MAX_OBJECT:,} characters" if is_long else "not JSON"
                    raise DataError(f"{self._file}, element {number}: {size} ({error})") from error
                continue
            if end < len(self._text) or not self._more():  # a number may go on
                self._place = end
                return element

    def _more(self) -> bool:
        """Twice as much as there is, so that a long object is not parsed again for each chunk."""
        try:
            chunk = self._reader.read(max(_CHUNK, len(self._text)))
        except UnicodeDecodeError as error:
            raise DataError(f"{self._file}: not UTF-8 ({error})") from error
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)


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
