"""Local copies of a remote cache's files: hashed as they arrive, shared by all processes, bounded in size.

Files are named by their hash, so that caches which share shards share their copies.  The least recently used
ones make room.  A file is reserved at its full size before it is fetched, so the bound holds at every moment;
one that is removed while a process has it mapped stays readable there until that process lets go.

Machines may share the folder.  Whoever fetches a file holds a lock on its part; a part without one is of the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from shared.cache.storage import RemoteFolder, explain_remote_errors, explain_write_errors
from shared.errors import CacheFormatError, RecipeError

BLOCK_BYTES: Final = 8 << 20
DEFAULT_MAX_BYTES: Final = 64 << 30
LOCKS: Final = 64
PART: Final = re.compile(r"[0-9a-f]{64}\.[0-9]{1,9}\.part")  # as ``_download`` calls what it fetches


class Staging:
    """A folder of local copies.

    ``folder``     default ``$TEACHONCE_STAGING``, else ``~/.cache/teachonce/staging``
    ``max_bytes``  default ``$TEACHONCE_STAGING_BYTES``, else 64 GiB
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        chosen = folder or os.environ.get("TEACHONCE_STAGING") or os.path.join(home, "teachonce", "staging")
        self.folder = Path(chosen)
        self.max_bytes = max_bytes or _max_bytes_of_environment()

    def fetch(self, source: RemoteFolder, name: str, *, sha256: str, num_bytes: int) -> Path:
        """The local copy of a file, fetched if it is not there.  Another process may remove it at any time:
        open it at once, and fetch again when it is gone.

        Raises   CacheFormatError  when the file is missing, is not what the manifest says, or exceeds the
                 bound
        """
        where = f"{source.where}, {name}"
        if num_bytes > self.max_bytes:
            raise CacheFormatError(
                f"{where}: {num_bytes} bytes do not fit into the staging folder {self.folder} of "
                f"{self.max_bytes}. Set TEACHONCE_STAGING_BYTES higher."
            )
        path = self._copy_of(sha256)
        with explain_write_errors(where, str(path)):
            self._make_folder()
            if not self._use(path):
                with self._locked(f".lock-{int(sha256[:4], 16) % LOCKS}"):
                    if not self._use(path):  # another process may have fetched it meanwhile
                        self._download(source, name, path, sha256=sha256, num_bytes=num_bytes, where=where)
        return path

    def keep(self, sha256s: Iterable[str]) -> None:
        """Marks the copies of these files, as far as they are there, as used just now."""
        for sha256 in sha256s:
            self._use(self._copy_of(sha256))

    def _copy_of(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.arrow"

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RecipeError(
                f"staging folder {self.folder}: a file lies there, a folder is needed. Set TEACHONCE_STAGING to "
                "another one."
            ) from error

    def _use(self, path: Path) -> bool:
        """Marks a copy as used just now, by a file beside it: its stamp knows the copy by its own times."""
        if not path.exists():
            return False
        self._mark_of(path).touch(mode=0o600)
        return True

    def _mark_of(self, copy: Path) -> Path:
        return self.folder / f".used-{copy.stem}"

    def _download(
        self, source: RemoteFolder, name: str, path: Path, *, sha256: str, num_bytes: int, where: str
    ) -> None:
        temporary = self.folder / f"{sha256}.{os.getpid()}.part"
        try:
            with self._reserve(temporary, num_bytes, where=where):
                digest, received = hashlib.sha256(), 0
                with open(temporary, "r+b") as local:
                    for block in _blocks(source, name, where=where):
                        received += len(block)
                        if received > num_bytes:
                            break
                        digest.update(block)
                        local.write(block)
                if received != num_bytes or digest.hexdigest() != sha256:
                    raise CacheFormatError(
                        f"{where}: what arrived ({received} bytes, sha256 {digest.hexdigest()[:12]}) is not "
                        f"what the manifest says ({num_bytes}, {sha256[:12]}). Try again; if it stays so, "
                        f"delete {source.url}/{name} and run teacher-cache again."
                    )
                with self._locked(".lock"):  # whoever counts meanwhile would find neither name
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, num_bytes: int, *, where: str) -> IO[bytes]:
        """Makes a file of that size, after removing as many old copies as the bound asks for.

        Nobody takes it for one that a dead process has left, as long as what is returned is open.
        """
        deadline = time.monotonic() + 60
        while True:
            with self._locked(".lock"):
                if self._make_room(num_bytes):
                    held = open(temporary, "wb")  # noqa: SIM115
                    fcntl.flock(held, fcntl.LOCK_EX)
                    held.truncate(num_bytes)
                    return held
            if time.monotonic() > deadline:  # all room is taken by what other processes are fetching
                raise CacheFormatError(
                    f"{where}: no room in the staging folder {self.folder} of {self.max_bytes} bytes. Set "
                    "TEACHONCE_STAGING_BYTES higher."
                )
            time.sleep(0.05)

    def _make_room(self, num_bytes: int) -> bool:
        copies: list[tuple[int, int, Path]] = []
        total = num_bytes
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if PART.fullmatch(path.name) and not _is_held(path):
                    path.unlink()
                    continue
                total += status.st_size
                if path.suffix == ".arrow":
                    mark = self._mark_of(path)
                    used = mark.stat() if mark.exists() else status
                    copies.append((used.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(copies):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            self._mark_of(path).unlink(missing_ok=True)
            total -= size
        return total <= self.max_bytes

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_held(part: Path) -> bool:
    """Whether a process, of this machine or another, is fetching it; one that may not be opened counts as such."""
    try:
        descriptor = os.open(part, os.O_RDWR)
    except PermissionError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _max_bytes_of_environment() -> int:
    text = os.environ.get("TEACHONCE_STAGING_BYTES") or str(DEFAULT_MAX_BYTES)
    if not text.isascii() or not text.isdigit() or not int(text):
        raise RecipeError(
            f"TEACHONCE_STAGING_BYTES: {text!r} found, a whole number of bytes above 0 needed. Correct or unset it."
        )
    return int(text)


def _blocks(source: RemoteFolder, name: str, *, where: str) -> Iterator[bytes]:
    """A remote file, part by part.  What goes wrong there is no fault of the disk that it is written to."""
    try:
        with explain_remote_errors(source.where, name), source.open(name) as remote:
            while block := remote.read(BLOCK_BYTES):
                yield block
    except FileNotFoundError as error:
        raise CacheFormatError(f"{where}: is missing. Capture it again.") from error
