"""Segments: runs of shards that follow one another, each with a list file and an index file of its own.

A commit that adds to a cache writes the segments that it changes, and names the others as they are.  Their
sizes depend on the number of shards alone, as the digits of a binary number do: so the same shards give the
same files, however many commits they came in, a cache has few segments, and a shard is written again only
when two segments of equal size become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import pyarrow as pa
from pydantic import model_validator

from shared.cache.format import KEY_BYTES, MAX_FILE_BYTES, as_buffer, sha256_hex
from shared.cache.identity import Record
from shared.cache.shard_list import Count, FileName, Sha256, ShardList, open_list
from shared.cache.storage import Folder, LocalFolder
from shared.errors import CacheFormatError

FEWEST = 64  # shards of a segment that is not the last: below it, a file of its own is not worth its request
MOST = 1 << 16  # so that examples within a segment have 32-bit places with shards of 65,536
REMEDY = "Run teacher-cache again: it makes the file again from the shards."


class FileInfo(Record):
    """A list or an index."""

    name: FileName
    sha256: Sha256
    bytes: Count


class Segment(Record):
    """Shards that follow one another: how many, of how many examples, and the files that tell of them."""

    shards: Count
    examples: Count
    list: FileInfo | None  # None in version 1
    index: FileInfo

    @model_validator(mode="after")
    def _index_fits_its_bytes(self) -> Self:
        if self.index.bytes > MAX_FILE_BYTES or KEY_BYTES * self.examples > self.index.bytes:
            raise ValueError(
                f"an index of {self.index.bytes} bytes found, with {self.examples} examples in the shards"
            )
        return self

    def files(self) -> Iterator[FileInfo]:
        if self.list is not None:
            yield self.list
        yield self.index


def segment_sizes(num_shards: int) -> list[int]:
    """Shards of each segment: as many of ``MOST`` as fit, smaller powers of two downwards, and what is left.

    Holds    they sum to ``num_shards``; beside those of ``MOST`` there are at most 11; a shard added alone writes
             fewer than ``FEWEST`` entries again, but for one commit in ``FEWEST``, which joins segments: by such
             commits an entry is written at most 11 times
    """
    largest, rest = divmod(num_shards, MOST)
    sizes = [MOST] * largest
    size = MOST // 2
    while size >= FEWEST:
        if rest & size:
            sizes.append(size)
        size //= 2
    left = rest % FEWEST
    return [*sizes, left] if left else sizes


def spans(num_shards: int) -> Iterator[range]:
    """The places of each segment's shards."""
    first = 0
    for size in segment_sizes(num_shards):
        yield range(first, first + size)
        first += size


def open_shards(segments: Sequence[Segment], read: Callable[[FileInfo], pa.Buffer]) -> ShardList:
    """The lists of these segments as one; ``read`` gives a file's bytes, their hash checked.

    Raises   CacheFormatError  when a list is damaged, or not of the shards and examples that the manifest says
    """
    return ShardList.joined(open_segment_list(segment, read) for segment in segments)


def open_segment_list(segment: Segment, read: Callable[[FileInfo], pa.Buffer]) -> ShardList:
    """The list of one segment.  Raises as :func:`open_shards`."""
    assert segment.list is not None
    found = open_list(read(segment.list), where=segment.list.name)
    told, counted = (segment.shards, segment.examples), (len(found), found.total("examples"))
    if counted != told:
        raise CacheFormatError(
            f"{segment.list.name}: {counted[0]} shards with {counted[1]} examples found, {told[0]} with {told[1]} "
            f"in the manifest. {REMEDY}"
        )
    return found


def read_file(folder: Folder, file: FileInfo) -> pa.Buffer:
    """The bytes of a list or an index, their hash checked; local files are mapped.

    Raises   CacheFormatError  when it is missing or damaged
    """
    where = f"{folder.where}, {file.name}"
    try:
        if isinstance(folder, LocalFolder):
            buffer = as_buffer(folder.path / file.name)
        else:
            buffer = as_buffer(folder.read(file.name, max_bytes=file.bytes))
    except FileNotFoundError as error:
        raise CacheFormatError(f"{where}: is missing. {REMEDY}") from error
    found = sha256_hex(buffer)
    if found != file.sha256:
        raise CacheFormatError(
            f"{where}: sha256 {found[:12]} differs from the manifest ({file.sha256[:12]}). {REMEDY}"
        )
    if buffer.size != file.bytes:
        raise CacheFormatError(
            f"{where}: {buffer.size} bytes found, {file.bytes} in the manifest, which was written wrong or changed. "
            "Restore it, or capture the cache again."
        )
    return buffer
