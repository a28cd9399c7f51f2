"""Files that are files: a named pipe, a device or a folder in the place of one is refused before it is read.

To open a pipe waits for who writes into it, and a device may never end: a picture that is one would hang a whole
run.  Opened without waiting and looked at by its descriptor, a file cannot be exchanged in between.  Where a reader
knows how large a file can be, a larger one is refused as well, and one of holes: a terabyte of nothing takes a few
bytes of a disk.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import NotAFileError
from shared.temporaries import remove_left, written_beside

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


HOLES_MATTER_BYTES = 1 << 20
OUTPUT = 1  # the file descriptor of standard output


def open_regular(path: str | Path, *, max_bytes: int | None = None) -> io.BufferedReader:
    """As ``open(path, "rb")``.

    Raises   NotAFileError  when it is no regular file, has more bytes, or is mostly holes; OSError as ``open`` does
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        refuse_irregular(path)  # a socket cannot be opened at all
        raise
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
        if max_bytes is not None:
            _refuse_size(path, descriptor, max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, *, max_bytes: int | None = None) -> bytes:
    with naming(path), open_regular(path, max_bytes=max_bytes) as stream:
        return stream.read()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError the file's name where the system leaves it out, as when a read or a write fails."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_output(path: Path, data: bytes) -> None:
    """A file that the user has named, at once or not at all; a pipe or a device, as ``/dev/stdout``, is written to.

    Its folder is made where it is missing.  A link stays, and what it leads to is written.
    """
    with naming(path):
        if _is_our_output(path):
            sys.stdout.flush()
            with open(OUTPUT, "wb", closefd=False) as stream:
                stream.write(data)
        elif path.exists() and not path.is_file():
            with open(path, "wb") as stream:
                stream.write(data)
        else:
            whole = path.resolve()
            whole.parent.mkdir(parents=True, exist_ok=True)
            remove_left(whole)
            with written_beside(whole) as temporary:
                temporary.write_bytes(data)


def is_another_file(path: Path, is_ours: Callable[[Any], bool]) -> bool:
    """Whether ``write_output`` would replace something else than JSON that we wrote; an empty file is no loss.

    is_ours  of what the JSON says
    """
    if not holds_something(path):
        return False
    try:
        return not is_ours(json.loads(read_regular(path)))
    except (ValueError, RecursionError):
        return True


def holds_something(path: Path) -> bool:
    """Whether a file is there that an output would replace, and it is not empty."""
    return path.is_file() and path.stat().st_size > 0 and not _is_our_output(path)


def _is_our_output(path: Path) -> bool:
    """Whether it is what this process prints to, by whatever name: to open a file anew would begin at its start."""
    try:
        return os.path.samestat(os.fstat(OUTPUT), path.stat())
    except OSError:
        return False


def refuse_irregular(path: str | Path) -> None:
    """For files that a library opens; what is not there is for it to say.

    Raises   NotAFileError  when there is something, and it is no regular file
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    _refuse(path, mode)


def refuse_irregular_members(folder: str | Path) -> None:
    """As ``refuse_irregular`` of all that lies in a folder, but for folders in it."""
    for path in Path(folder).iterdir():
        if not path.is_dir():
            refuse_irregular(path)


def _refuse(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFileError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def _refuse_size(path: str | Path, descriptor: int, max_bytes: int) -> None:
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        raise NotAFileError(f"{path}: {size} bytes found, at most {max_bytes} possible")
    if size > HOLES_MATTER_BYTES and _data_bytes(descriptor, size) < size // 2:
        raise NotAFileError(f"{path}: {size} bytes found, most of them holes")


def _data_bytes(descriptor: int, size: int) -> int:
    """Bytes that are no holes, counted up to half of the file; all where the file system does not tell."""
    total = at = 0
    try:
        while at < size and total < size // 2:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            total, at = total + end - at, end
    except OSError as error:
        return total if error.errno == errno.ENXIO else size  # ENXIO: nothing but a hole up to the end
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return total
