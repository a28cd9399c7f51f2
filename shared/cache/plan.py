"""What a capture has to do: an ordered list of units, each of which becomes one shard.

A plan is made once, by one process, and stored in the cache's folder as ``plan.arrow``; other processes and
later starts read it, so that nobody has to hash the pictures again.  A unit's id is a digest of the capture's
content identity and of its keys: whoever captures the unit, whenever, writes the same shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.format import (
    FORMAT,
    FORMAT_VERSION,
    KEY_BYTES,
    KEY_DTYPE,
    METADATA_KEY,
    canonical_json,
    read_metadata,
)
from shared.cache.identity import Identity
from shared.cache.index import split_keys
from shared.cache.manifest import SkippedRow
from shared.errors import CacheFormatError

PLAN_NAME = "plan.arrow"


@dataclass(frozen=True, eq=False)
class Unit:
    """Examples that are captured together.

    Shapes   rows (n,) int64: where the caller finds each example; its own numbers, given back unchanged
    ``slot``: the place in the old manifest of a lost shard that this unit replaces, None for new examples
    """

    unit_id: str
    keys: tuple[bytes, ...]
    rows: npt.NDArray[np.int64]
    slot: int | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class Plan:
    """The units of a capture in the order of their shards, and the rows that are left out.

    ``request`` is a digest of what the plan was made for; ``base`` the hash of the manifest that it adds to.
    """

    identity: Identity
    units: tuple[Unit, ...]
    skipped: tuple[SkippedRow, ...] = ()
    duplicates: int = 0
    base: str | None = None
    request: str = ""
    num_examples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_examples", sum(map(len, self.units)))

    def encode(self) -> pa.Buffer:
        """The bytes of ``plan.arrow``."""
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": self.identity.model_dump(mode="json"),
            "skipped": [row.model_dump(mode="json") for row in self.skipped],
            "duplicates": self.duplicates,
            "base": self.base,
            "request": self.request,
            "slots": [unit.slot for unit in self.units],
        }
        schema = pa.schema(
            [("key", pa.binary(KEY_BYTES)), ("row", pa.int64()), ("unit", pa.int32())],
            metadata={METADATA_KEY: canonical_json(metadata).encode()},
        )
        sizes = [len(unit) for unit in self.units]
        rows = np.concatenate([unit.rows for unit in self.units] or [np.empty(0, np.int64)])
        columns = [
            pa.array([key for unit in self.units for key in unit.keys], pa.binary(KEY_BYTES)),
            pa.array(rows, pa.int64()),
            pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), pa.int32()),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        return sink.getvalue()

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Plan:
        """Raises   CacheFormatError  when the bytes are no plan of this format."""
        try:
            table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
            metadata = read_metadata(table.schema, where=where)
            identity = Identity.model_validate_json(json.dumps(metadata["identity"]))
            skipped = tuple(SkippedRow(**row) for row in metadata["skipped"])
            units = _units_of(table, identity, metadata["slots"])
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise CacheFormatError(
                f"{where}: cannot be read ({error}). Delete the file and start again."
            ) from error
        return cls(identity, units, skipped, metadata["duplicates"], metadata["base"], metadata["request"])


def _units_of(table: pa.Table, identity: Identity, slots: Sequence[int | None]) -> tuple[Unit, ...]:
    keys, rows = table.column("key").to_pylist(), table.column("row").to_numpy()
    bounds = np.searchsorted(table.column("unit").to_numpy(), np.arange(len(slots) + 1))
    spans = [slice(int(start), int(stop)) for start, stop in pairwise(bounds)]
    digest = identity.digest()
    return tuple(
        make_unit(digest, keys[span], rows[span], slot=slot) for span, slot in zip(spans, slots, strict=True)
    )


def make_unit(
    identity_digest: str, keys: Sequence[bytes], rows: npt.NDArray[np.int64], *, slot: int | None = None
) -> Unit:
    """A unit and its id: 64 bits of a digest over the content identity and the keys in order."""
    digest = hashlib.blake2b(bytes.fromhex(identity_digest) + b"".join(keys), digest_size=8)
    return Unit(digest.hexdigest(), tuple(keys), np.asarray(rows, dtype=np.int64), slot)


@dataclass(frozen=True, eq=False)
class Wanted:
    """The examples a cache shall hold, in order, equal ones once.

    Shapes   keys (R,) S16; rows (R,) int64
    """

    keys: npt.NDArray[np.bytes_]
    rows: npt.NDArray[np.int64]
    duplicates: int

    @classmethod
    def of(cls, rows: Iterable[tuple[bytes, int]]) -> Wanted:
        """From (key, row number) pairs; the first of equal keys counts."""
        first: dict[bytes, int] = {}
        total = 0
        for key, row in rows:
            first.setdefault(key, row)
            total += 1
        if any(len(key) != KEY_BYTES for key in first):
            raise ValueError(f"keys have {KEY_BYTES} bytes")
        keys = np.frombuffer(b"".join(first), dtype=KEY_DTYPE)
        return cls(keys, np.fromiter(first.values(), np.int64, len(first)), total - len(first))

    def without(self, taken: npt.NDArray[np.bool_]) -> Wanted:
        return Wanted(self.keys[~taken], self.rows[~taken], self.duplicates)

    def cut(self, identity_digest: str, *, examples_per_shard: int) -> list[Unit]:
        """Consecutive examples, ``examples_per_shard`` at a time."""
        keys = split_keys(self.keys)
        starts = range(0, len(keys), examples_per_shard)
        spans = [slice(start, start + examples_per_shard) for start in starts]
        return [make_unit(identity_digest, keys[span], self.rows[span]) for span in spans]

    def request(self, identity: Identity, *, base: str | None, examples_per_shard: int) -> str:
        """Digest of all that decides a plan's units."""
        digest = hashlib.sha256(canonical_json([identity.digest(), base, examples_per_shard]).encode())
        digest.update(self.keys.tobytes())
        return digest.hexdigest()
