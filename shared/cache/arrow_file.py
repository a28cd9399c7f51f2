"""Arrow files that announce themselves: looked at before Arrow allocates what they ask for.

Arrow decompresses whole buffers when it opens a record batch: two gigabytes of zeros fit in a few kilobytes.
Files of a cache are uncompressed (docs/cache-format.md), so anything else is refused from its metadata alone.
The metadata are flatbuffers; the few fields that are needed are read here by hand.

Source   the Arrow columnar format: File.fbs, Message.fbs; flatbuffers' binary format
"""

from __future__ import annotations

import struct

import pyarrow as pa

from shared.errors import CacheFormatError

_MAGIC = b"ARROW1"
_BLOCK = struct.Struct("<qi4xq")  # offset, bytes of metadata, bytes of body
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MAX_DICTIONARIES = 1


def open_uncompressed(buffer: pa.Buffer, *, where: str) -> pa.RecordBatchFileReader:
    """The file's reader, after a look at each of its batches.

    Raises   CacheFormatError   for compressed buffers, more dictionaries than a shard has, or no Arrow file
             pa.ArrowException  for what Arrow itself finds
    """
    try:
        blocks = _blocks(memoryview(buffer))
        is_compressed = any(_is_compressed(memoryview(buffer), offset) for offset in blocks)
    except (struct.error, IndexError, OverflowError) as error:
        raise CacheFormatError(
            f"{where}: cannot be read as an Arrow file (its metadata point outside of it). Delete it and "
            "capture again: only its examples are recomputed."
        ) from error
    if is_compressed:
        raise CacheFormatError(
            f"{where}: compressed Arrow buffers found, files of a cache have none. It was not written by "
            "teacher-cache: get the cache from its source again, or capture it."
        )
    return pa.ipc.open_file(buffer)


def _blocks(data: memoryview) -> list[int]:
    """Where the messages of dictionaries and record batches begin."""
    if bytes(data[-6:]) != _MAGIC or bytes(data[:6]) != _MAGIC:
        raise IndexError
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    start = len(data) - 10 - footer_bytes
    if not 8 <= start < len(data):
        raise IndexError
    footer = start + _unsigned(data, start)
    dictionaries, batches = (_vector(data, footer, field) for field in (2, 3))
    if len(dictionaries) > _MAX_DICTIONARIES:
        raise IndexError
    return [*dictionaries, *batches]


def _vector(data: memoryview, table: int, field: int) -> list[int]:
    place = _field(data, table, field)
    if place is None:
        return []
    place += _unsigned(data, place)
    count = _unsigned(data, place)
    if count * _BLOCK.size > len(data):
        raise IndexError
    return [_BLOCK.unpack_from(data, place + 4 + i * _BLOCK.size)[0] for i in range(count)]


def _is_compressed(data: memoryview, offset: int) -> bool:
    if not 0 <= offset < len(data):
        raise IndexError
    start = offset + (8 if _unsigned(data, offset) == 0xFFFFFFFF else 4)
    message = start + _unsigned(data, start)
    kind, header = _field(data, message, 1), _field(data, message, 2)
    if kind is None or header is None or data[kind] not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        raise IndexError
    batch = header + _unsigned(data, header)
    if data[kind] == _DICTIONARY_BATCH:
        inner = _field(data, batch, 1)
        if inner is None:
            raise IndexError
        batch = inner + _unsigned(data, inner)
    return _field(data, batch, 3) is not None


def _field(data: memoryview, table: int, field: int) -> int | None:
    """Where a table has a field, None where it has not."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - back
    if vtable < 0:
        raise IndexError
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * field >= vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * field)
    return table + offset if offset else None


def _unsigned(data: memoryview, place: int) -> int:
    if place < 0:
        raise IndexError
    return int(struct.unpack_from("<I", data, place)[0])
