"""The manifest: written last, it makes a folder of shards a cache.

``manifest.json`` holds no times and no hosts, so that the same rows captured in one go or in ten give the
same bytes.  Its own hash, over its canonical JSON, is stored in it: an edited or cut manifest is refused,
and a student's checkpoint names the cache by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from shared.cache.format import (
    FORMAT,
    FORMAT_VERSION,
    KEY_BYTES,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SHARD_BYTES,
    canonical_json,
    check_version,
    first_line,
)
from shared.cache.identity import Identity, Record
from shared.cache.layout import MANIFEST_NAME
from shared.cache.storage import Folder
from shared.errors import CacheFormatError

MAX_ROW_ENTRIES = 1 << 24  # of one example, as payloads have it
MAX_TOLD = 10  # problems of one manifest
Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # what every JSON reader keeps exact
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]


class ShardInfo(Record):
    """One shard file: what it is called, what it must hash to, what it holds."""

    name: FileName  # relative to the cache, with "/"
    sha256: Sha256
    bytes: Count
    examples: Count
    positions: Count
    entries: Count
    truncated: Count  # examples whose answer was cut to max_answer_tokens

    @model_validator(mode="after")
    def _fits_its_bytes(self) -> Self:
        """No work is planned by numbers that the file cannot hold: a key, and a byte a position, at least."""
        if self.bytes > MAX_SHARD_BYTES:
            raise ValueError(f"{self.bytes} bytes found, a shard has at most {MAX_SHARD_BYTES}")
        if KEY_BYTES * self.examples + self.positions > self.bytes or self.truncated > self.examples:
            raise ValueError(
                f"{self.examples} examples ({self.truncated} truncated) and {self.positions} positions do not "
                f"fit into {self.bytes} bytes"
            )
        if self.entries > MAX_ROW_ENTRIES * self.examples:
            raise ValueError(f"{self.entries} entries found, more than {self.examples} examples can have")
        return self


class IndexInfo(Record):
    """The sorted table of keys."""

    name: FileName
    sha256: Sha256
    bytes: Count


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
    bytes: Count  # shards and index
    truncated: Count
    skipped: Count
    duplicates: Count


class Manifest(Record):
    """A committed cache."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    identity: Identity
    index: IndexInfo
    shards: tuple[ShardInfo, ...]
    skipped: tuple[SkippedRow, ...]
    totals: Totals
    created_by: dict[str, str]  # package versions
    sha256: Sha256

    @model_validator(mode="after")
    def _index_fits_its_bytes(self) -> Self:
        examples = sum(shard.examples for shard in self.shards)
        if self.index.bytes > MAX_FILE_BYTES or KEY_BYTES * examples > self.index.bytes:
            raise ValueError(
                f"an index of {self.index.bytes} bytes found, with {examples} examples in the shards"
            )
        return self

    @classmethod
    def build(
        cls,
        *,
        identity: Identity,
        index: IndexInfo,
        shards: Sequence[ShardInfo],
        skipped: Sequence[SkippedRow],
        duplicates: int,
        created_by: Mapping[str, str],
    ) -> Manifest:
        """The manifest of these shards, with its totals and its hash."""
        totals = Totals(
            examples=sum(shard.examples for shard in shards),
            positions=sum(shard.positions for shard in shards),
            entries=sum(shard.entries for shard in shards),
            bytes=sum(shard.bytes for shard in shards) + index.bytes,
            truncated=sum(shard.truncated for shard in shards),
            skipped=len(skipped),
            duplicates=duplicates,
        )
        unsigned = cls(
            identity=identity,
            index=index,
            shards=tuple(shards),
            skipped=tuple(skipped),
            totals=totals,
            created_by=dict(created_by),
            sha256="0" * 64,
        )
        return unsigned.model_copy(update={"sha256": content_hash(unsigned.model_dump(mode="json"))})

    def dumps(self) -> bytes:
        """The bytes of ``manifest.json``."""
        data = (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()
        if len(data) > MAX_MANIFEST_BYTES:
            raise CacheFormatError(
                f"{MANIFEST_NAME}: {len(data)} bytes needed, at most {MAX_MANIFEST_BYTES} are read. Set "
                "cache.examples_per_shard higher, or capture into several caches."
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
            return cls.model_validate_json(data)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in errors[:MAX_TOLD]
            )
            problems += f"; and {len(errors) - MAX_TOLD} more" if len(errors) > MAX_TOLD else ""
            raise CacheFormatError(f"{where}, {MANIFEST_NAME}: {problems}.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def content_hash(tree: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all fields but ``sha256``."""
    rest = {name: value for name, value in tree.items() if name != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def load_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a folder, checked; None where it has none."""
    try:
        data = folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise CacheFormatError(f"{folder.where}, {MANIFEST_NAME}: cannot be read ({reason}).") from error
    return Manifest.loads(data, where=folder.where)
