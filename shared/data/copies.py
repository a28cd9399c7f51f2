"""Local copies of data files in a form that can be read at any place: unpacked, or cut where rows begin.

    copy = kept_copy(path, Stamp.of(path), ".jsonl", write=lambda sink: ...)

A copy is known by its file's path and ``Stamp``: a file that was replaced gets a new copy, whatever its modification
time says, and the older ones are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import FileError


@dataclass(frozen=True)
class Stamp:
    """What changes when a file is replaced or written to; ``cp -p`` keeps the modification time, not these."""

    num_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        return cls.of_status(path.stat())

    @classmethod
    def of_status(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def copies_folder() -> Path:
    """Where the copies lie: ``$TEACHONCE_COPIES``, else ``~/.cache/teachonce/copies``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TEACHONCE_COPIES") or os.path.join(home, "teachonce", "copies"))


def kept_copy(path: Path, stamp: Stamp, suffix: str, *, write: Callable[[Path], None], remedy: str) -> Path:
    """The copy of a file, which ``write`` writes where there is none.

    remedy   what to do where it cannot be written, beside making room
    Raises   FileError  when it cannot be written; and what ``write`` raises
    """
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    name = hashlib.sha256(repr(stamp).encode()).hexdigest()[:24]
    folder = copies_folder()
    copy = folder / f"{place}-{name}{suffix}"
    part = copy.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ranks of one machine: one copies, the others wait
            if not copy.exists():
                write(part)
                for older in folder.glob(f"{place}-*{suffix}"):
                    older.unlink()
                os.replace(part, copy)
    except OSError as error:
        raise FileError(
            f"{folder}: no copy of {path} can be written there ({error.strerror or error}). {remedy}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return copy
