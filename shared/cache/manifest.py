"""The manifest: written last, it makes a folder of shards a cache.

``manifest.json`` holds no times and no hosts, so that the same rows captured in one go or in ten give the
same bytes.  Its own hash, over its canonical JSON, is stored in it: an edited or cut manifest is refused,
and a student's checkpoint names the cache by it.  It names the lists of shards and the indices by their
hashes, so it has a few kilobytes however many shards there are.

Version 1 listed the shards itself, and had one index.  It is read as a manifest of one segment without a list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import Field, PrivateAttr, ValidationError

from shared.cache.format import (
    FORMAT,
    KEY_BYTES,
    MANIFEST_VERSION,
    MAX_MANIFEST_BYTES,
    canonical_json,
    check_version,
    first_line,
)
from shared.cache.identity import Identity, Record
from shared.cache.layout import MANIFEST_NAME
from shared.cache.segments import FileInfo, Segment, open_shards, read_file, segment_sizes
from shared.cache.shard_list import Count, Sha256, ShardInfo, ShardList
from shared.cache.storage import Folder
from shared.errors import CacheFormatError

MAX_TOLD = 10  # problems of one manifest
MAX_SHARDS = 1 << 32  # of one cache: no loop over segments is planned by a number that nobody has
Key = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]


class SkippedRow(Record):
    """A row of the data that is not in the cache, and why; ``row`` reads like ``train[17]``."""

    row: str
    reason: str
    key: Key | None = None  # hex; None where the row could not even be read


class Totals(Record):
    """Sums over the shards; ``duplicates`` counts rows of the data that equal an earlier row."""

    examples: Count
    positions: Count
    entries: Count
    bytes: Count  # shards, lists and indices
    truncated: Count
    skipped: Count
    duplicates: Count


class _Facts(Record):
    """What both versions say in the same words."""

    format: str
    format_version: int
    identity: Identity
    skipped: tuple[SkippedRow, ...]
    totals: Totals
    created_by: dict[str, str]  # package versions
    sha256: Sha256


class _FirstVersion(_Facts):
    """``manifest.json`` as version 1 had it."""

    index: FileInfo
    shards: tuple[ShardInfo, ...]


class Manifest(_Facts):
    """A committed cache."""

    format: str = FORMAT
    format_version: int = MANIFEST_VERSION
    segments: tuple[Segment, ...]
    _shards: ShardList | None = PrivateAttr(default=None)
    _read: Callable[[FileInfo], pa.Buffer] | None = PrivateAttr(default=None)

    @property
    def shards(self) -> ShardList:
        """All shards in order; the list files are opened when somebody asks.

        Raises   CacheFormatError  when one is missing or damaged
        """
        if self._shards is None:
            assert self._read is not None
            self._shards = open_shards(self.segments, self._read)
        return self._shards

    @property
    def num_shards(self) -> int:
        return sum(segment.shards for segment in self.segments)

    @property
    def first_places(self) -> list[int]:
        """The number of each segment's first shard."""
        return list(accumulate((segment.shards for segment in self.segments), initial=0))[:-1]

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """Lists and indices."""
        return tuple(file for segment in self.segments for file in segment.files())

    def with_shards(self, shards: ShardList) -> Self:
        """The same, its lists opened."""
        self._shards = shards
        return self

    def says(
        self,
        shards: ShardList,
        *,
        identity: Identity,
        skipped: Sequence[SkippedRow],
        duplicates: int,
        created_by: Mapping[str, str],
    ) -> bool:
        """Whether it would be no news; versions alone are none.

        What ``created_by`` says of the teacher's files is no version: a student compares it.
        """
        facts = [
            {name: value for name, value in one.items() if name.startswith("teacher_")}
            for one in (created_by, self.created_by)
        ]
        told = (self.identity, self.skipped, self.totals.duplicates, facts[1])
        return told == (identity, tuple(skipped), duplicates, facts[0]) and self.shards == shards

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.sha256 == other.sha256

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def build(
        cls,
        *,
        identity: Identity,
        segments: Sequence[Segment],
        shards: ShardList,
        skipped: Sequence[SkippedRow],
        duplicates: int,
        created_by: Mapping[str, str],
    ) -> Manifest:
        """The manifest of these shards, with its totals and its hash."""
        totals = Totals(
            examples=shards.total("examples"),
            positions=shards.total("positions"),
            entries=shards.total("entries"),
            bytes=shards.total("bytes") + sum(file.bytes for one in segments for file in one.files()),
            truncated=shards.total("truncated"),
            skipped=len(skipped),
            duplicates=duplicates,
        )
        unsigned = cls(
            identity=identity,
            segments=tuple(segments),
            skipped=tuple(skipped),
            totals=totals,
            created_by=dict(created_by),
            sha256="0" * 64,
        )
        signed = unsigned.model_copy(update={"sha256": content_hash(unsigned._tree())})
        return signed.with_shards(shards)

    def _tree(self) -> dict[str, Any]:
        """What is stored."""
        tree = self.model_dump(mode="json")
        if self.format_version == 1:
            (segment,) = tree.pop("segments")
            tree |= {
                "index": segment["index"],
                "shards": [one.model_dump(mode="json") for one in self.shards],
            }
        return tree

    def dumps(self) -> bytes:
        """The bytes of ``manifest.json``."""
        data = (json.dumps(self._tree(), sort_keys=True, indent=1) + "\n").encode()
        if len(data) > MAX_MANIFEST_BYTES:
            raise CacheFormatError(
                f"{MANIFEST_NAME}: {len(data)} bytes needed, at most {MAX_MANIFEST_BYTES} are read; "
                f"{len(self.skipped)} rows left out are listed in it. Lower data.max_dropped, or take such rows out "
                "of the data."
            )
        return data

    @classmethod
    def loads(cls, data: bytes, *, where: str) -> Manifest:
        """Parses and checks ``manifest.json``.

        Raises   CacheFormatError  when it is damaged, was edited, or is of another format version
        """
        try:
            # decoded here: json would guess UTF-16 from bytes, which pydantic cannot read
            tree = json.loads(data.decode(), parse_constant=_refuse_constant)
            found = content_hash(tree) if isinstance(tree, dict) else ""
        except (ValueError, RecursionError) as error:  # 1e999 parses, as infinity, and cannot be hashed
            raise CacheFormatError(
                f"{where}, {MANIFEST_NAME}: not JSON ({error}); the file is damaged. Restore it, or capture "
                "the cache again."
            ) from error
        if not isinstance(tree, dict):
            raise CacheFormatError(f"{where}, {MANIFEST_NAME}: a JSON object is needed.")
        check_version(tree.get("format"), tree.get("format_version"), where=f"{where}, {MANIFEST_NAME}")
        if found != tree.get("sha256"):
            raise CacheFormatError(
                f"{where}, {MANIFEST_NAME}: its content hashes to {found[:12]}, it says "
                f"{str(tree.get('sha256'))[:12]}; the file changed after it was committed. Restore it, or "
                "capture the cache again."
            )
        try:
            if tree["format_version"] == 1:
                return cls._of_first_version(_FirstVersion.model_validate_json(data))
            manifest = cls.model_validate_json(data)
            manifest._require_segments()
            return manifest
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in errors[:MAX_TOLD]
            )
            problems += f"; and {len(errors) - MAX_TOLD} more" if len(errors) > MAX_TOLD else ""
            raise CacheFormatError(f"{where}, {MANIFEST_NAME}: {problems}.") from error
        except ValueError as error:
            raise CacheFormatError(f"{where}, {MANIFEST_NAME}: {error}.") from error

    @classmethod
    def _of_first_version(cls, stored: _FirstVersion) -> Manifest:
        """One segment, whose list is in the manifest.  Raises ValueError where they do not fit together."""
        shards = ShardList.of(stored.shards)
        segment = Segment(
            shards=len(shards), examples=shards.total("examples"), list=None, index=stored.index
        )
        facts = {name: getattr(stored, name) for name in _Facts.model_fields}
        return cls(**facts, segments=(segment,)).with_shards(shards)

    def _require_segments(self) -> None:
        """Raises   ValueError  unless the segments are those of their number of shards, each with a list"""
        if self.num_shards > MAX_SHARDS:
            raise ValueError(f"segments: {self.num_shards} shards found, at most {MAX_SHARDS} possible")
        sizes, wanted = [segment.shards for segment in self.segments], segment_sizes(self.num_shards)
        if sizes != wanted:
            raise ValueError(f"segments: of {sizes[:9]} shards found, of {wanted[:9]} needed")
        num_examples = sum(segment.examples for segment in self.segments)
        if num_examples != self.totals.examples:
            raise ValueError(
                f"segments: of {num_examples} examples found, {self.totals.examples} examples in its totals"
            )
        if any(segment.list is None for segment in self.segments):
            raise ValueError("segments: each needs a list")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def content_hash(tree: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all fields but ``sha256``."""
    rest = {name: value for name, value in tree.items() if name != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def load_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a folder, checked; None where it has none.  Its lists are read when they are asked for."""
    try:
        data = folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise CacheFormatError(f"{folder.where}, {MANIFEST_NAME}: cannot be read ({reason}).") from error
    manifest = Manifest.loads(data, where=folder.where)
    manifest._read = partial(read_file, folder)
    return manifest
