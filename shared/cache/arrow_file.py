"""Arrow files of a cache, which are uncompressed: what is not is refused from its metadata alone."""

from __future__ import annotations

import pyarrow as pa

from shared.arrow_messages import MALFORMED, blocks, is_compressed
from shared.errors import CacheFormatError

_MAX_DICTIONARIES = 1


def open_uncompressed(buffer: pa.Buffer, *, where: str) -> pa.RecordBatchFileReader:
    """The file's reader, after a look at each of its batches.

    Raises   CacheFormatError   for compressed buffers, more dictionaries than a shard has, or no Arrow file
             pa.ArrowException  for what Arrow itself finds
    """
    try:
        data = memoryview(buffer)
        dictionaries, batches = blocks(data)
        if len(dictionaries) > _MAX_DICTIONARIES:
            raise IndexError
        compressed = any(is_compressed(block.of(data)[0]) for block in (*dictionaries, *batches))
    except MALFORMED as error:
        raise CacheFormatError(
            f"{where}: cannot be read as an Arrow file (its metadata point outside of it). Delete it and "
            "capture again: only its examples are recomputed."
        ) from error
    if compressed:
        raise CacheFormatError(
            f"{where}: compressed Arrow buffers found, files of a cache have none. It was not written by "
            "teacher-cache: get the cache from its source again, or capture it."
        )
    return pa.ipc.open_file(buffer)
