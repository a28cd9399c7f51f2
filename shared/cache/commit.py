"""From old shards and captured units to the files of a manifest: its segments' lists and indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.format import sha256_hex
from shared.cache.identity import Identity
from shared.cache.index import CacheIndex, KeyIndex, ShardColumns, open_index, split_keys
from shared.cache.layout import PLAN_NAME, index_name, list_name, sha256_in
from shared.cache.manifest import Manifest, SkippedRow
from shared.cache.plan import REMEDY, Plan
from shared.cache.segments import FileInfo, Segment, spans
from shared.cache.shard import ShardView
from shared.cache.shard_list import ShardInfo, ShardList
from shared.errors import CacheFormatError, DataError

MAX_PLACES = 1 << 32  # of one segment: places in its index are 32 bits wide
Publish = Callable[[str, pa.Buffer], None]


@dataclass(frozen=True, eq=False)
class NewShard:
    """A shard that no manifest names yet, and what the index must know of it."""

    info: ShardInfo
    columns: ShardColumns
    skipped: tuple[SkippedRow, ...] = ()

    @classmethod
    def of(cls, name: str, view: ShardView) -> Self:
        """Nothing of the view is held: a process may map some thousand files at a time."""
        skipped = tuple(SkippedRow(**row) for row in view.metadata["skipped"])
        columns = view.keys.copy(), view.num_positions.astype(np.uint32)
        return cls(shard_info(name, view), columns, skipped)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a cache is to hold: old shards and new ones, in order.

    Shapes   order (S,) int64: the place of an old shard in ``base``, or ``~number`` of one of ``new``
    """

    base: Manifest | None
    base_index: CacheIndex
    order: npt.NDArray[np.int64]
    new: Sequence[NewShard]

    @classmethod
    def of_plan(
        cls, plan: Plan, base: Manifest | None, base_index: CacheIndex, new: Sequence[NewShard]
    ) -> Self:
        """The old shards, repaired ones in their places, lost ones left out; then the others of the plan.

        ``new``  the shard of each unit of the plan
        Raises   CacheFormatError  when the plan speaks of shards that the old manifest does not have
        """
        num_old = 0 if base is None else base.num_shards
        order = np.arange(num_old)
        slots = [-1 if unit.slot is None else unit.slot for unit in plan.units]
        if max([*plan.lost, *slots], default=-1) >= num_old:
            raise CacheFormatError(
                f"{PLAN_NAME}: shard {max([*plan.lost, *slots])} found, the manifest has {num_old}; the file is "
                f"damaged. {REMEDY}"
            )
        added = [~number for number, slot in enumerate(slots) if slot < 0]
        is_lost = np.zeros(num_old, dtype=bool)
        is_lost[list(plan.lost)] = True
        # A unit whose examples are refused once more has its shard of before, which is listed once.
        if base is not None and (again := {one.info.name for one in new if not one.info.examples}):
            is_lost |= [name in again for name in base.shards.names()]
        for number, slot in enumerate(slots):
            if slot >= 0:
                order[slot], is_lost[slot] = ~number, False
        return cls(base, base_index, np.append(order[~is_lost], np.array(added, np.int64)), new)

    @classmethod
    def of_new(cls, new: Sequence[NewShard]) -> Self:
        return cls(None, CacheIndex.of([]), ~np.arange(len(new)), new)

    @cached_property
    def shards(self) -> ShardList:
        """All of them."""
        old = ShardList.of([]) if self.base is None else self.base.shards
        both = ShardList.joined([old, ShardList.of(one.info for one in self.new)])
        return both.take(np.where(self.order < 0, len(old) + ~self.order, self.order))

    def write_segments(self, publish: Publish, *, where: str) -> list[Segment]:
        """Publishes the lists and indices that the old manifest does not have; returns all segments.

        Raises   CacheFormatError  when two shards hold the same example
        """
        old_columns = _Columns(self.base_index)
        segments: list[Segment] = []
        parts: list[KeyIndex] = []
        written: list[int] = []
        for number, span in enumerate(spans(len(self.shards))):
            order = self.order[span.start : span.stop]
            if self._stays(number, span):
                assert self.base is not None
                segment, part = self.base.segments[number], self.base_index.parts[number]
            else:
                columns = [self.new[~one].columns if one < 0 else old_columns[one] for one in order.tolist()]
                shards = self.shards[span.start : span.stop]
                segment, part = write_segment(shards, columns, publish, where=where)
                written.append(number)
            segments.append(segment)
            parts.append(part)
        _require_different(parts, written, where=where)
        return segments

    def _stays(self, number: int, span: range) -> bool:
        """Whether a segment is what the old manifest has under this number.  Version 1 has no lists to stay."""
        if self.base is None or self.base.format_version == 1 or number >= len(self.base.segments):
            return False
        is_same_span = (self.base.first_places[number], self.base.segments[number].shards) == (
            span.start,
            len(span),
        )
        return is_same_span and np.array_equal(self.order[span.start : span.stop], np.array(span))


class _Columns:
    """Of old shards by their places, from an index; the part in hand is turned round once."""

    def __init__(self, index: CacheIndex) -> None:
        self._index, self._part = index, -1
        self._columns: list[ShardColumns] = []

    def __getitem__(self, place: int) -> ShardColumns:
        part = int(np.searchsorted(self._index.first_shards, place, side="right")) - 1
        if part != self._part:
            self._part, self._columns = part, self._index.parts[part].shard_columns()
        return self._columns[place - int(self._index.first_shards[part])]


def write_segment(
    shards: ShardList, columns: Sequence[ShardColumns], publish: Publish, *, where: str
) -> tuple[Segment, KeyIndex]:
    """Publishes the list and the index of shards that follow one another.

    Raises   CacheFormatError  when they hold more examples than an index has places for
    """
    require_places(shards.column("examples"), where=where)
    index = KeyIndex.from_shards(columns)
    files = []
    for data, name_of in ((shards.encode(), list_name), (index.encode(), index_name)):
        digest = sha256_hex(data)
        files.append(FileInfo(name=name_of(digest), sha256=digest, bytes=data.size))
        publish(files[-1].name, data)
    segment = Segment(shards=len(shards), examples=len(index), list=files[0], index=files[1])
    return segment, open_index(data, shard_sizes=shards.column("examples"), where=where)


def require_places(shard_sizes: Sequence[int] | npt.NDArray[np.uint64], *, where: str) -> None:
    """Raises   CacheFormatError  when shards of so many examples make a segment whose index has no place for all"""
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    for span in spans(len(sizes)):
        num_examples = int(sizes[span.start : span.stop].sum())
        if num_examples > MAX_PLACES:
            raise CacheFormatError(
                f"{where}: {num_examples} examples in {len(span)} shards found, at most {MAX_PLACES} possible. Set "
                "cache.examples_per_shard lower, or capture into several caches."
            )


def _require_different(parts: Sequence[KeyIndex], written: Sequence[int], *, where: str) -> None:
    """Raises   CacheFormatError  when an example lies in two shards, one of them in a segment that was written"""
    twice: list[bytes] = []
    for number in written:
        keys = parts[number].keys
        others = CacheIndex.of([*parts[:number], *parts[number + 1 :]])
        twice += [*parts[number].duplicates(), *split_keys(keys[others.find_array(keys) >= 0])]
    if twice:
        raise CacheFormatError(
            f"{where}: example {twice[0].hex()} lies in two shards ({len(set(twice))} such examples). Capture the "
            "cache again in an empty folder."
        )


def shard_info(name: str, view: ShardView) -> ShardInfo:
    """A shard's entry in the list."""
    return ShardInfo(
        name=name,
        sha256=sha256_in(name),
        bytes=view.num_bytes,
        examples=len(view),
        positions=int(view.num_positions.sum(dtype=np.int64)),
        entries=int(view.num_entries.sum(dtype=np.int64)),
        truncated=int(view.truncated.sum()),
    )


def grown_identity(base: Manifest | None, identity: Identity) -> Identity:
    """The identity, with those data of the old manifest that it does not list anew.

    Of data that are listed anew, whoever wrote answers stays named: rows of theirs stay in the cache.
    """
    if base is None:
        return identity
    before = {(source.name, source.split): source for source in base.identity.data}
    anew = []
    for source in identity.data:
        old = before.pop((source.name, source.split), source)
        writers = tuple(dict.fromkeys([*old.written_by, *source.written_by]))
        anew.append(source.model_copy(update={"written_by": writers}))
    return identity.model_copy(update={"data": (*before.values(), *anew)})


def all_skips(contents: Contents, identity: Identity, listed: Sequence[SkippedRow]) -> list[SkippedRow]:
    """Rows listed now, beside those of the old manifest unless this capture speaks for all the data again.

    A row that is listed again keeps its place; one that the cache holds by now does not stay.
    """
    base = contents.base
    if base is None:
        return list(listed)
    if len(grown_identity(base, identity).data) == len(identity.data):
        again = {row.key or row for row in listed}
        older = [row for row in base.skipped if (row.key or row) in again]
    else:
        new = KeyIndex.from_shards([one.columns for one in contents.new])
        older = not_held(base.skipped, CacheIndex.of([*contents.base_index.parts, new]))
    return list({row.key or row: row for row in (*older, *listed)}.values())


def not_held(skipped: Sequence[SkippedRow], index: CacheIndex | KeyIndex) -> list[SkippedRow]:
    """The skipped rows but those whose examples the index holds."""
    keyed = [bytes.fromhex(row.key) for row in skipped if row.key is not None]
    held = {key for key, place in zip(keyed, index.find(keyed).tolist(), strict=True) if place >= 0}
    return [row for row in skipped if row.key is None or bytes.fromhex(row.key) not in held]


def require_few_skipped(number: int, *, max_skipped: int, where: str) -> None:
    """Raises   DataError  when more rows are left out than may be"""
    if number > max_skipped:
        raise DataError(
            f"{where}: {number} row(s) are left out so far, data.max_dropped allows {max_skipped}. "
            "Raise it and run the same command again, which captures nothing twice; or mend these rows"
        )
