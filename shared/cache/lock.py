"""One process at a time that plans, commits or merges in a cache folder.

A POSIX record lock on a file: the kernel gives it back when its owner dies, however it dies, so there is
nothing to expire; data-loader workers do not inherit it (``flock`` would live on in them); and NFS passes it
on to its server.  Where a file system cannot lock at all, captures go on without: two at once waste work but
cannot damage a cache, because every file appears whole under a name made of its content.

Processes that capture together hold it for moments, to plan and to commit, and say so in it: for those others wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Self

from shared.cache.layout import LOCK_NAME
from shared.cache.storage import explain_write_errors
from shared.errors import CacheFormatError

POLL_S = 0.1
FOR_A_MOMENT = " for a moment"
CANNOT_LOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_held_here: set[Path] = set()


class CacheBusyError(CacheFormatError):
    """Another capture writes to this cache."""

    is_for_a_moment = False


class CaptureLock:
    """Held from :meth:`acquire` to :meth:`close` or the death of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.works = True
        self._descriptor: int | None = None
        self._owner = os.getpid()

    @classmethod
    def in_folder(cls, folder: Path, *, for_a_moment: bool = False) -> Self:
        """Makes the folder if it is new, and acquires its lock, when no other process holds it for a moment."""
        with explain_write_errors(f"cache {folder}", LOCK_NAME):
            folder.mkdir(parents=True, exist_ok=True)
            lock = cls(folder)
            while True:
                try:
                    lock.acquire(for_a_moment=for_a_moment)
                    return lock
                except CacheBusyError as busy:
                    if not busy.is_for_a_moment:
                        raise
                time.sleep(POLL_S)

    def acquire(self, *, for_a_moment: bool = False) -> None:
        """Raises   CacheBusyError  at once when another process, or another lock of this one, holds it."""
        if self.path.resolve() in _held_here:  # a record lock does not exclude its own process
            raise self._busy("this very process")
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # its owner removed the file between our open and our lock
                os.close(descriptor)
        _held_here.add(self.path.resolve())
        os.ftruncate(self._descriptor, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}{FOR_A_MOMENT * for_a_moment}\n"
        os.pwrite(self._descriptor, owner.encode(), 0)

    def close(self) -> None:
        """Removes the file and gives the lock back; in a forked child it does nothing."""
        if self._descriptor is not None and self._owner == os.getpid():
            _held_here.discard(self.path.resolve())
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise self._busy(owner) from error
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            self.works = False

    def _busy(self, owner: str) -> CacheBusyError:
        busy = CacheBusyError(
            f"cache {self.path.parent}: {owner} is writing to it. Wait until it has ended, or stop it."
        )
        busy.is_for_a_moment = owner.endswith(FOR_A_MOMENT)
        return busy

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
