"""Local copies of data files in a form that can be read at any place: unpacked, or cut where rows begin.

    copy = kept_copy(path, Stamp.of(path), ".jsonl", write=lambda sink: ...)

A copy is known by its file's path and ``Stamp``: a file that was replaced gets a new copy, whatever its modification
time says.  Older ones may be in use: by a process that began before, or by a machine that has another file there and
the same home folder.  Whoever reads a copy marks it now and then; those without a mark of the last day are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import FileError
from shared.machine import this_machine

UNUSED_S = 24 * 3600.0  # after which a copy is removed
MARK_S = 3600.0  # between two marks of a process
_marked: dict[Path, float] = {}  # when this process did, by its own clock


@dataclass(frozen=True)
class Stamp:
    """What changes when a file is replaced or written to; ``cp -p`` keeps size and modification time, not the others.

    machine  on which it was taken
    """

    num_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    machine: str = field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> Stamp:
        return cls.of_status(path.stat())

    @classmethod
    def of_status(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, this_machine())

    def matches(self, found: Stamp) -> bool:
        """Whether it is of the file that has the other stamp.

        Another machine may have a copy of the file on its own disk, which shares only what ``cp -p`` keeps.
        """
        if self.machine == found.machine:
            return self == found
        return (self.num_bytes, self.modified_ns) == (found.num_bytes, found.modified_ns)


def require_unchanged(path: Path, stamp: Stamp) -> None:
    """Raises   FileError  when the file is not the one that has that stamp"""
    try:
        found = Stamp.of(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read any more ({error.strerror})") from error
    if stamp.matches(found):
        return
    if stamp.machine != found.machine:
        raise FileError(
            f"{path}: not the file that was opened on another machine of this job: its size or its modification time "
            "differs. Copy it with its times (rsync -a), or keep the data on a file system that the machines share"
        )
    raise FileError(f"{path}: the file has changed since it was opened. Start again")


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
                try:
                    write(part)
                    os.replace(part, copy)
                finally:  # as long as the lock is held: the next one's has the same name
                    with contextlib.suppress(OSError):
                        part.unlink(missing_ok=True)
            if mark_used(copy):
                _remove_unused(folder, place)
    except OSError as error:
        raise FileError(
            f"{folder}: no copy of {path} can be written there ({error.strerror or error}). {remedy}"
        ) from error
    return copy


def mark_used(copy: Path) -> bool:
    """Keeps a copy from being removed for a day; whether it was time for a mark."""
    now = time.monotonic()
    if now - _marked.get(copy, -MARK_S) < MARK_S:
        return False
    _marked[copy] = now
    with contextlib.suppress(OSError):  # it is another user's, or gone
        os.utime(copy)
    return True


def _remove_unused(folder: Path, place: str) -> None:
    """Copies of the file at that place, and what killed processes have left of one."""
    for old in folder.glob(f"{place}-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > UNUSED_S:
                old.unlink()
