"""What all files of a cache have in common: version, canonical JSON, hashes, the metadata of Arrow schemas.

``docs/cache-format.md`` is the specification of the format.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import CacheFormatError, NotAFileError
from shared.regular_files import open_regular

FORMAT = "teachonce-cache"
FORMAT_VERSION = 2  # the newest that is read; every file names the first version that had its layout
MANIFEST_VERSION = LIST_VERSION = LOG_PROBS_VERSION = 2
ROWS_VERSION = (
    1  # of shards, index and plan; a part of the content identity, so that rows stay what they were
)
KEY_BYTES = 16
METADATA_KEY = b"teachonce"
MAX_MANIFEST_BYTES = 64 << 20  # in version 1, 180,000 shards; as Python objects some twenty times as much
MAX_FILE_BYTES = 1 << 37  # an index of 2**32 examples
MAX_SHARD_BYTES = 1 << 33  # its columns have 32-bit offsets
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")


def canonical_json(value: Any) -> str:
    """JSON of one spelling: sorted keys, no blanks, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_hex(data: bytes | memoryview | pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open_file(Path(path)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_version(format_name: object, version: object, *, where: str) -> None:
    """Raises CacheFormatError unless this program can read what is stored there."""
    if format_name != FORMAT:
        raise CacheFormatError(
            f"{where}: format {format_name!r} found, {FORMAT!r} needed; this is not a teacher cache."
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CacheFormatError(
            f"{where}: format version {version!r} is no version number; the file is damaged."
        )
    if version > FORMAT_VERSION:
        raise CacheFormatError(
            f"{where}: format version {version} found, this program reads up to {FORMAT_VERSION}. "
            "Upgrade teachonce, or capture the cache again."
        )


def make_metadata(values: Mapping[str, Any], *, version: int = ROWS_VERSION) -> dict[bytes, bytes]:
    """The metadata of a schema: the values, with format and version, as canonical JSON."""
    stored = {"format": FORMAT, "format_version": version, **values}
    return {METADATA_KEY: canonical_json(stored).encode()}


def read_metadata(found: pa.Schema, *, where: str) -> dict[str, Any]:
    """The JSON that a file's schema carries, its version checked."""
    raw = (found.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise CacheFormatError(
            f"{where}: no {METADATA_KEY.decode()!r} metadata found; this is no file of a cache."
        )
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{where}: its metadata is not JSON ({error}).") from error
    if not isinstance(metadata, dict):
        raise CacheFormatError(f"{where}: its metadata is not a JSON object.")
    check_version(metadata.get("format"), metadata.get("format_version"), where=where)
    return metadata


def narrowest(largest: int) -> pa.DataType:
    """The unsigned integer type that holds numbers up to this one in the fewest bytes."""
    return pa.uint8() if largest < 1 << 8 else pa.uint16() if largest < 1 << 16 else pa.uint32()


UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32())


def keys_of(batch: pa.RecordBatch) -> npt.NDArray[np.bytes_]:
    """(R,) S16, a view of the column "key" of a batch that was validated; Arrow's buffers may be longer."""
    return np.frombuffer(batch.column("key").buffers()[1] or b"", KEY_DTYPE, count=len(batch))


def as_buffer(source: Path | bytes | pa.Buffer) -> pa.Buffer:
    """A file mapped, or bytes as they are.  Raises CacheFormatError as :func:`open_file` does."""
    if isinstance(source, Path):
        open_file(source).close()
        return pa.memory_map(str(source)).read_buffer()
    return pa.py_buffer(source) if isinstance(source, bytes) else source


def open_file(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> io.BufferedReader:
    """A file of a cache, looked at before anything is read.

    Raises   CacheFormatError   unless it is a regular file of at most ``max_bytes``, most of them on a disk
             FileNotFoundError  where there is none
    """
    try:
        return open_regular(path, max_bytes=max_bytes)
    except NotAFileError as error:
        raise CacheFormatError(
            f"{error}; this is not what was committed. Restore it, or capture again."
        ) from error


def first_line(error: BaseException) -> str:
    """Of its message; Arrow adds its own source lines."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
