"""Each file's hash is checked before its first use, and not again by every worker of every epoch.

What was checked is remembered in this process, and for other processes of this user as an empty stamp file
in the machine's temporary folder.  A stamp names device, inode, size, times of modification and of change, and hash,
so a file that was written to since is checked again, also where somebody set its modification time back; it is
believed for a day.  What a stamp cannot see is a disk
that rots without a write: ``teacher-cache verify`` reads every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from shared.cache.format import sha256_of_file
from shared.errors import CacheFormatError

BELIEVED_S = 24 * 3600
SETTLED_NS = 2_000_000_000  # a younger file could still change without a new modification time


class VerifiedFiles:
    """Remembers which files had the hash they should have.  Small and picklable."""

    def __init__(self, stamps: Path | None = None) -> None:
        self.stamps = default_stamps() if stamps is None else stamps
        self._known: set[str] = set()

    def require(self, path: Path, sha256: str, *, where: str) -> None:
        """Raises CacheFormatError when the file hashes otherwise, FileNotFoundError when there is none."""
        stamp, settled = _stamp(path, sha256)
        if stamp in self._known or (settled and self._is_stamped(stamp)):
            self._known.add(stamp)
            return
        found = sha256_of_file(path)
        if found != sha256:
            raise CacheFormatError(
                f"{where}: sha256 {found[:12]} differs from the manifest ({sha256[:12]}); the file changed "
                f"after it was committed. Delete {path} and run teacher-cache again: only what is "
                "missing is made again."
            )
        self._known.add(stamp)
        if settled:
            self._write_stamp(stamp)

    def _is_stamped(self, stamp: str) -> bool:
        if not self._may_be_trusted():
            return False
        try:
            written = (self.stamps / stamp).stat().st_mtime
        except OSError:
            return False
        # A clock that was ahead is no reason to believe longer.
        return 0 <= time.time() - written < BELIEVED_S

    def _write_stamp(self, stamp: str) -> None:
        """No stamp, no harm: the next process checks for itself."""
        with contextlib.suppress(OSError):
            self.stamps.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._may_be_trusted():
                (self.stamps / stamp).touch(mode=0o600)

    def _may_be_trusted(self) -> bool:
        """Whether nobody else can have written stamps there."""
        try:
            status = self.stamps.stat()
        except OSError:
            return False
        return status.st_uid == os.getuid() and not status.st_mode & 0o022


def default_stamps() -> Path:
    """The folder of this user's stamps on this machine."""
    return Path(tempfile.gettempdir()) / f"teachonce-{os.getuid()}-verified"


def _stamp(path: Path, sha256: str) -> tuple[str, bool]:
    status = path.stat()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)
    settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest(), settled
