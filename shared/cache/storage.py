"""Where a cache's files lie: a local folder, or any fsspec URL.

A file appears whole or not at all.  Locally it is written under a temporary name, synced, read back, hashed
and renamed, and then the folder is synced.  Object stores make a put visible only when it is complete; on
other remote file systems a cut file may show, and is found out by the hash that its name or the manifest
carries.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa

from shared.cache.format import MAX_FILE_BYTES, first_line, open_file, sha256_hex, sha256_of_file
from shared.errors import CacheFormatError
from shared.temporaries import (
    TEMPORARY_PREFIX,
    is_temporary,
    remove_temporary,
    writer_is_dead,
    written_beside,
)

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PARTLY = "only a part of it arrived. Run the same command again."
READS = 5  # of a remote file that others write, or of which a part arrives, before that is an error
FOLDERS = 10  # that others remove, as empty, before a file is in them


class Folder(Protocol):
    """A cache's files by name, relative to it and with ``/``; ``where`` opens every error message."""

    where: str

    def names(self, prefix: str) -> list[str]:
        """All names that begin with ``prefix`` (which contains its folder), sorted."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""

    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Raises FileNotFoundError where there is none, CacheFormatError where there is more or another thing."""

    def publish(self, name: str, data: bytes | pa.Buffer) -> None:
        """Writes a file, whole or not at all, in the place of an older one of that name."""

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small new file; False where one of that name is there.

        Not synced: a power cut may take it, or leave it empty.  A remote storage without conditional writes may let
        two succeed.
        """

    def append(self, name: str, line: bytes, *, max_bytes: int) -> None:
        """Adds a line to a text file, which may be new, and ends one that a crash has cut.

        Raises   CacheFormatError  where something else lies there, or more than ``max_bytes``
        """

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""


def open_folder(location: str | os.PathLike[str]) -> Folder:
    """The folder at a path or URL; nothing is created or read."""
    text = os.fspath(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteFolder(text) if "://" in text else LocalFolder(text)


class LocalFolder:
    """A folder on a file system of this machine, or one mounted there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.where = f"cache {self.path}"

    def names(self, prefix: str) -> list[str]:
        folder, _, stem = prefix.rpartition("/")
        try:
            with os.scandir(self.path / folder) as found:
                # A set: a file that is replaced meanwhile may be listed twice.
                names = {item.name for item in found if item.is_file() and item.name.startswith(stem)}
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(f"{folder}/{name}" if folder else name for name in names)

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        with open_file(self.path / name, max_bytes=max_bytes) as stream:
            return stream.read()

    def publish(self, name: str, data: bytes | pa.Buffer) -> None:
        target = self.path / name
        with explain_write_errors(self.where, name):
            with written_beside(target) as temporary:
                with _new_file(temporary) as stream:
                    stream.write(data)
                    sync_file(stream)
                written = sha256_of_file(temporary)
                if written != sha256_hex(data):
                    raise CacheFormatError(
                        f"{self.where}, {name}: read back other bytes than were written; the disk or the "
                        "memory of this machine is faulty."
                    )
            sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        target = self.path / name
        with explain_write_errors(self.where, name):
            try:
                stream = _new_file(target)
            except FileExistsError:
                if not target.parent.is_dir():
                    raise
                return False
            try:
                with stream:
                    stream.write(data)
            except BaseException:  # it would pass for another's that a crash has cut
                self.remove(name)
                raise
        return True

    def append(self, name: str, line: bytes, *, max_bytes: int) -> None:
        """Nothing that is there is written again."""
        target = self.path / name
        with contextlib.suppress(FileNotFoundError):
            open_file(target, max_bytes=max_bytes).close()
        with explain_write_errors(self.where, name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "a+b") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(size - 1, 0))
                is_cut = stream.read(1) not in (b"", b"\n")
                try:
                    stream.write(b"\n" * is_cut + line + b"\n")
                    sync_file(stream)
                except BaseException:
                    stream.truncate(size)
                    raise

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_temporaries(self, *, alive_too: bool) -> list[str]:
        """Removes what killed writers left; with ``alive_too`` also what may be a living one's."""
        removed = []
        for folder in ("", "shards/"):
            for name in self.names(folder + TEMPORARY_PREFIX):
                if is_temporary(name) and (alive_too or writer_is_dead(self.path / name)):
                    remove_temporary(self.path / name)
                    removed.append(name)
        return removed


class RemoteFolder:
    """A folder behind an fsspec URL.  Each process connects for itself: connections do not survive a fork."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.where = f"cache {self.url}"
        self._connection: tuple[int, Any, str] | None = None

    def connect(self) -> tuple[Any, str]:
        """The file system, and this folder's path in it."""
        if self._connection is None or self._connection[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                filesystem, root = url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise CacheFormatError(f"{self.where}: cannot be reached ({error}).") from error
            self._connection = (os.getpid(), filesystem, root)
        return self._connection[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "where": self.where, "_connection": None}

    def names(self, prefix: str) -> list[str]:
        with explain_remote_errors(self.where, prefix):
            filesystem, root = self.connect()
            filesystem.invalidate_cache()
            found = filesystem.glob(f"{glob.escape(root)}/{prefix}*", detail=True)
            return sorted(path[len(root) + 1 :] for path, info in found.items() if info["type"] == "file")

    def size(self, name: str) -> int | None:
        try:
            with explain_remote_errors(self.where, name):
                filesystem, root = self.connect()
                filesystem.invalidate_cache()
                return int(filesystem.size(f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Size and content are two requests: another process may write the file in between, as claimants do."""
        with explain_remote_errors(self.where, name):
            filesystem, root = self.connect()
            for _ in range(READS):
                filesystem.invalidate_cache()  # a listing's size may be of an older content
                size = filesystem.size(f"{root}/{name}")
                if size is not None and int(size) > max_bytes:
                    raise CacheFormatError(
                        f"{self.where}, {name}: {size} bytes found, at most {max_bytes} possible."
                    )
                data: bytes = filesystem.cat_file(f"{root}/{name}")
                if size is None or len(data) == int(size):
                    return data
        raise CacheFormatError(f"{self.where}, {name}: {PARTLY}")

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        filesystem, root = self.connect()
        return filesystem.open(f"{root}/{name}", "rb", cache_type="readahead")

    def publish(self, name: str, data: bytes | pa.Buffer) -> None:
        if not self._has_arrived(name, data):
            raise CacheFormatError(f"{self.where}, {name}: {PARTLY}")

    def _has_arrived(self, name: str, data: bytes | pa.Buffer) -> bool:
        """Writes a file; False where another size is there then, as of what another process has written."""
        with explain_write_errors(self.where, name), explain_remote_errors(self.where, name):
            filesystem, root = self.connect()
            path = f"{root}/{name}"
            _pipe(filesystem, path, bytes(data))
            filesystem.invalidate_cache()
            return int(filesystem.size(path)) == len(data)

    def create(self, name: str, data: bytes) -> bool:
        with explain_write_errors(self.where, name), explain_remote_errors(self.where, name):
            filesystem, root = self.connect()
            path = f"{root}/{name}"
            filesystem.invalidate_cache()
            if filesystem.exists(path):
                return False
            try:
                _pipe(filesystem, path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:  # as S3 says that another process was the first
                if "PreconditionFailed" in str(error) or "ConditionalRequestConflict" in str(error):
                    return False
                raise
        return True

    def append(self, name: str, line: bytes, *, max_bytes: int) -> None:
        """Object stores cannot: the whole is written again, and once more where another process did so as well."""
        for _ in range(READS):
            try:
                found = self.read(name, max_bytes=max_bytes)
            except FileNotFoundError:
                found = b""
            if self._has_arrived(name, found + line + b"\n"):
                return
        raise CacheFormatError(f"{self.where}, {name}: {PARTLY}")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), explain_remote_errors(self.where, name):
            filesystem, root = self.connect()
            filesystem.rm_file(f"{root}/{name}")


def _pipe(filesystem: Any, path: str, data: bytes, **options: str) -> None:
    """Writes a remote file, and makes its folder where the storage has folders.

    Raises   FileNotFoundError  where the bucket is missing: it may be misspelt, and is not ours to make
    """
    try:
        filesystem.pipe_file(path, data, **options)
    except FileNotFoundError:
        bucket = path.partition("/")[0]  # empty where paths begin with a slash: there are folders alone
        if bucket and not filesystem.exists(bucket):
            raise
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, data, **options)


def _new_file(path: Path) -> IO[bytes]:
    """Raises   FileExistsError  where one is there.  Makes its folder, also where others remove it as empty."""
    for _ in range(FOLDERS):
        with contextlib.suppress(FileNotFoundError):
            return open(path, "xb")
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent.parent)
    return open(path, "xb")


def sync_file(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last through a power cut, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_remote_errors(where: str, name: str) -> Iterator[None]:
    """Turns whatever a remote storage fails with into an error for the user, but for a file that is not there.

    Libraries of storages have errors of their own, of no common base.
    """
    try:
        yield
    except (CacheFormatError, FileNotFoundError):
        raise
    except Exception as error:
        raise CacheFormatError(
            f"{where}, {name}: the storage does not answer as it should ({type(error).__name__}: "
            f"{first_line(error)}). Everything finished before is safe: run the same command again when it does."
        ) from error


@contextlib.contextmanager
def explain_write_errors(where: str, name: str) -> Iterator[None]:
    """Turns what the system refuses or cannot do into an error for the user; nothing half-written stays."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise CacheFormatError(
                f"{where}, {name}: no space left to write it ({error.strerror}). Everything finished "
                "before is safe: make room and run the same command again."
            ) from error
        reason = error.strerror or first_line(error)
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise CacheFormatError(
                f"{where}, {name}: may not be written ({reason}). Name a folder that you may write to."
            ) from error
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise CacheFormatError(
                f"{where}, {name}: cannot be written ({reason}); a file lies where a folder is needed. Name "
                "another folder."
            ) from error
        raise CacheFormatError(
            f"{where}, {name}: cannot be written ({reason}). Everything finished before is safe: run the same "
            "command again when that is mended, or name another folder."
        ) from error
