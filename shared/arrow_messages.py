"""What Arrow's messages say of their buffers, read before Arrow allocates what they ask for.

Arrow decompresses all buffers of a record batch when it opens it: two gigabytes of zeros fit in a few kilobytes.  The
metadata are flatbuffers; the few fields that are needed are read here by hand.

    for block in blocks(buffer):
        message, body = block.of(buffer)
        decoded_bytes(message, body)

Source   the Arrow columnar format: File.fbs, Message.fbs; flatbuffers' binary format
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"ARROW1"
_BLOCK = struct.Struct("<qi4xq")  # offset, bytes of metadata, bytes of body
_BUFFER = struct.Struct("<qq")  # offset in the body, bytes
_LENGTH = struct.Struct("<q")  # that a compressed buffer begins with; -1: it is not compressed
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
MALFORMED = (struct.error, IndexError, OverflowError)  # metadata that point outside of their file


@dataclass(frozen=True)
class Block:
    """Where a message of an Arrow file lies."""

    offset: int
    metadata_bytes: int
    body_bytes: int

    def of(self, data: memoryview) -> tuple[memoryview, memoryview]:
        """Its flatbuffer and its body."""
        if not 0 <= self.offset < len(data):
            raise IndexError
        prefix = 8 if _unsigned(data, self.offset) == 0xFFFFFFFF else 4
        body = self.offset + self.metadata_bytes
        return data[self.offset + prefix : body], data[body : body + self.body_bytes]


def blocks(data: memoryview) -> tuple[list[Block], list[Block]]:
    """The dictionaries and the record batches of an Arrow file.  Raises one of ``MALFORMED``"""
    if bytes(data[-6:]) != MAGIC or bytes(data[:6]) != MAGIC:
        raise IndexError
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    start = len(data) - 10 - footer_bytes
    if not 8 <= start < len(data):
        raise IndexError
    footer = start + _unsigned(data, start)
    return _blocks(data, footer, 2), _blocks(data, footer, 3)


def is_compressed(message: memoryview) -> bool:
    """Of a record batch or a dictionary.  Raises one of ``MALFORMED``"""
    return _field(message, _batch(message), 3) is not None


def decoded_bytes(message: memoryview, body: memoryview) -> int:
    """Bytes that all buffers of a record batch or a dictionary unfold to; 0 where they are not compressed.

    Raises one of ``MALFORMED``
    """
    if not is_compressed(message):
        return 0
    total = 0
    for offset, length in _structs(message, _batch(message), 2, _BUFFER):
        if length >= _LENGTH.size:
            if offset < 0:
                raise IndexError
            total += max(_LENGTH.unpack_from(body, offset)[0], 0)
    return total


def _blocks(data: memoryview, footer: int, field: int) -> list[Block]:
    return [Block(*found) for found in _structs(data, footer, field, _BLOCK)]


def _structs(data: memoryview, table: int, field: int, kind: struct.Struct) -> list[tuple[int, ...]]:
    """The vector of structs that a table has in a field."""
    place = _field(data, table, field)
    if place is None:
        return []
    place += _unsigned(data, place)
    count = _unsigned(data, place)
    if count * kind.size > len(data):
        raise IndexError
    return [kind.unpack_from(data, place + 4 + number * kind.size) for number in range(count)]


def _batch(message: memoryview) -> int:
    """Where the record batch of a message is described; in a dictionary's message it is inside."""
    table = _unsigned(message, 0)
    kind, header = _field(message, table, 1), _field(message, table, 2)
    if kind is None or header is None or message[kind] not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        raise IndexError
    batch = header + _unsigned(message, header)
    if message[kind] == _DICTIONARY_BATCH:
        inner = _field(message, batch, 1)
        if inner is None:
            raise IndexError
        batch = inner + _unsigned(message, inner)
    return batch


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
