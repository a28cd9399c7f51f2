"""One process at a time that plans, commits or merges in a cache folder.

A POSIX record lock on a file: the kernel gives it back when its owner dies, however it dies, so there is
nothing to expire; data-loader workers do not inherit it (``flock`` would live on in them); and NFS passes it
on to its server.  Where a file system cannot lock at all, captures go on without: two at once waste work but
cannot damage a cache, because every file appears whole under a name made of its content.

Processes that capture together hold it for moments, to plan and to commit, and say so in it: for those others wait.
Who has just taken it has not said anything yet, or what lies there is of one who was killed: so what it says is
believed when it has stayed for a while.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from tqdm import tqdm

from shared.cache.layout import LOCK_NAME
from shared.cache.storage import FOLDERS, explain_write_errors
from shared.errors import CacheFormatError

POLL_S = 0.1
# Patience with an owner that does not say that it holds the lock for a moment.
NAMELESS_S = 30.0  # when it says nothing yet; a network file system may show it late
NAMED_S = 1.0  # when it says another thing, which may be of the one before
QUIET_S = 5.0  # after which a wait is told
FOR_A_MOMENT = " for a moment"
CANNOT_LOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_held_here: set[Path] = set()


class CacheBusyError(CacheFormatError):
    """Another capture writes to this cache.

    owner       of the lock, as people name it
    patience_s  for how long the same owner is waited for
    """

    owner = ""
    patience_s = 0.0


class WaitStoppedError(CacheBusyError):
    """This process was asked to stop while it waited for another one."""


def never() -> bool:
    return False


class _Wait:
    """For the owner of a folder's lock, whoever it is by now."""

    def __init__(self, folder: Path, is_stopped: Callable[[], bool]) -> None:
        self._folder, self._is_stopped = folder, is_stopped
        self._begin = self._since = time.monotonic()  # since: of the same owner
        self._owner, self._is_told = "", False

    def go_on(self, busy: CacheBusyError) -> None:
        """Until it is time to try again.

        Raises   CacheBusyError    when the owner stays
                 WaitStoppedError  when this process is to stop
        """
        now = time.monotonic()
        if busy.owner != self._owner:
            self._owner, self._since = busy.owner, now
        if now - self._since >= busy.patience_s:
            raise busy
        if self._is_stopped():
            raise WaitStoppedError(
                f"cache {self._folder}: {busy.owner} is writing to it, and this process was waiting for its end"
            ) from busy
        if now - self._begin >= QUIET_S and not self._is_told:
            tqdm.write(f"cache {self._folder}: waiting for {busy.owner}, which plans or commits there")
            self._is_told = True
        time.sleep(POLL_S)


class CaptureLock:
    """Held from :meth:`acquire` to :meth:`close` or the death of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.works = True
        self._descriptor: int | None = None
        self._owner = os.getpid()

    @classmethod
    def in_folder(
        cls, folder: Path, *, for_a_moment: bool = False, is_stopped: Callable[[], bool] = never
    ) -> Self:
        """Makes the folder if it is new, and acquires its lock, when no other process holds it for a moment.

        Raises   CacheBusyError    when one holds it for longer, or another lock of this process does
                 WaitStoppedError  when ``is_stopped`` says so during the wait
        """
        with explain_write_errors(f"cache {folder}", LOCK_NAME):
            lock, wait = cls(folder), _Wait(folder, is_stopped)
            while True:
                try:
                    lock.acquire(for_a_moment=for_a_moment)
                    return lock
                except CacheBusyError as busy:
                    wait.go_on(busy)

    def acquire(self, *, for_a_moment: bool = False) -> None:
        """Makes the folder if it is new.

        Raises   CacheBusyError  at once when another process, or another lock of this one, holds it
        """
        if self.path.resolve() in _held_here:  # a record lock does not exclude its own process
            raise self._busy("this very process", patience_s=0.0)
        num_left = FOLDERS
        while self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who has just ended removed the empty folder
                num_left -= 1
                if not num_left:
                    raise
                continue
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
        owner = f"process {os.getpid()} on {socket.gethostname()}{FOR_A_MOMENT * for_a_moment}\n"
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, owner.encode(), 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the file and gives the lock back; in a forked child it does nothing."""
        if self._descriptor is not None and self._owner == os.getpid():
            _held_here.discard(self.path.resolve())
            with suppress(OSError):  # a file that stays holds nothing
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if not text:
                raise self._busy("another process", patience_s=NAMELESS_S) from error
            patience_s = math.inf if text.endswith(FOR_A_MOMENT) else NAMED_S
            raise self._busy(text.removesuffix(FOR_A_MOMENT), patience_s=patience_s) from error
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            self.works = False

    def _busy(self, owner: str, *, patience_s: float) -> CacheBusyError:
        busy = CacheBusyError(
            f"cache {self.path.parent}: {owner} is writing to it. Wait until it has ended, or stop it."
        )
        busy.owner, busy.patience_s = owner, patience_s
        return busy

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
