"""One capture at a time in a cache folder.

The lock is ``flock`` on a file: the kernel gives it back when its owner dies, however it dies, so there is
nothing to expire.  NFS passes it on to its server from version 3 (with lockd) or 4 on; where a file system
cannot lock at all, captures go on without, and two at once waste work but cannot damage a cache, because
every file appears whole under a name made of its content.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from shared.errors import CacheFormatError

LOCK_NAME = "capture.lock"
CANNOT_LOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class CacheBusyError(CacheFormatError):
    """Another capture writes to this cache."""


class CaptureLock:
    """Held from :meth:`acquire` to :meth:`release` or the death of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.works = True
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises   CacheBusyError  at once when another process holds it."""
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
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Removes the file and gives the lock back."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise CacheBusyError(
                f"cache {self.path.parent}: {owner} is writing to it. Wait until it has ended, or stop it."
            ) from error
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            self.works = False

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
