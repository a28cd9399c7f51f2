"""What a capture has to do: an ordered list of units, each of which becomes one shard.

A plan is made once, by one process, and stored in the cache's folder as ``plan.arrow``; other processes and
later starts read it, so that nobody has to hash the pictures again.  No manifest says what it must hash to,
so its last 32 bytes do.  A unit's id is a digest of the capture's
content identity and of its keys: whoever captures the unit, whenever, writes the same shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, NonNegativeInt, Strict, TypeAdapter

from shared.cache.arrow_file import open_uncompressed
from shared.cache.format import (
    KEY_BYTES,
    KEY_DTYPE,
    first_line,
    keys_of,
    make_metadata,
    read_metadata,
)
from shared.cache.identity import Identity
from shared.cache.index import Keys, as_key_array, split_keys
from shared.cache.manifest import SkippedRow
from shared.errors import CacheFormatError

DIGEST_BYTES = 32  # SHA-256
MAX_PLAN_BYTES = 1 << 32  # some 150 million examples
REMEDY = "Delete the file and run teacher-cache again: it keeps the finished units that its new plan has."


class _Facts(BaseModel):
    """What the metadata say beside identity, rows and units."""

    model_config = ConfigDict(strict=True)

    duplicates: NonNegativeInt
    base: str | None
    request: str
    lost: Annotated[tuple[NonNegativeInt, ...], Strict(False)]


_Slots = TypeAdapter(list[NonNegativeInt | None])


@dataclass(frozen=True, eq=False)
class Unit:
    """Examples that are captured together.

    Shapes   key_array (n,) S16; rows (n,) int64: where the caller finds each example; its own numbers, given back
             unchanged
    ``slot``: the place in the old manifest of a lost shard that this unit replaces, None for new examples
    """

    unit_id: str
    key_array: npt.NDArray[np.bytes_]
    rows: npt.NDArray[np.int64]
    slot: int | None = None

    def __len__(self) -> int:
        return len(self.key_array)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Made for each call: a plan holds many."""
        return tuple(split_keys(self.key_array))


@dataclass(frozen=True, eq=False)
class Plan:
    """The units of a capture in the order of their shards, and the rows that are left out.

    ``request`` is a digest of what the plan was made for; ``base`` the hash of the manifest that it adds to;
    ``lost`` the places in it of shards whose files were gone.
    """

    identity: Identity
    units: tuple[Unit, ...]
    skipped: tuple[SkippedRow, ...] = ()
    duplicates: int = 0
    base: str | None = None
    request: str = ""
    lost: tuple[int, ...] = ()
    num_examples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_examples", sum(map(len, self.units)))

    def encode(self) -> pa.Buffer:
        """The bytes of ``plan.arrow``: an Arrow file, and its SHA-256."""
        metadata = {
            "identity": self.identity.model_dump(mode="json"),
            "skipped": [row.model_dump(mode="json") for row in self.skipped],
            "duplicates": self.duplicates,
            "base": self.base,
            "request": self.request,
            "lost": list(self.lost),
            "slots": [unit.slot for unit in self.units],
        }
        schema = pa.schema(
            [("key", pa.binary(KEY_BYTES)), ("row", pa.int64()), ("unit", pa.int32())],
            metadata=make_metadata(metadata),
        )
        sizes = [len(unit) for unit in self.units]
        keys = np.concatenate([unit.key_array for unit in self.units] or [np.empty(0, KEY_DTYPE)])
        rows = np.concatenate([unit.rows for unit in self.units] or [np.empty(0, np.int64)])
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys)]),
            pa.array(rows, pa.int64()),
            pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), pa.int32()),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        data = sink.getvalue().to_pybytes()
        return pa.py_buffer(data + hashlib.sha256(data).digest())

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Plan:
        """Raises   CacheFormatError  when the bytes are no plan of this format.

        The digest comes first: Arrow takes a flipped bit for another plan, or crashes on it.
        """
        data, told = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        found = hashlib.sha256(data).digest()
        if found != told:
            raise CacheFormatError(
                f"{where}: sha256 {found.hex()[:12]} differs from the one at its end ({told.hex()[:12]}); the "
                f"file is damaged or of an earlier release. {REMEDY}"
            )
        try:
            stream = open_uncompressed(pa.py_buffer(data), where=where)
            batches = [stream.get_batch(number) for number in range(stream.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
            table = pa.Table.from_batches(batches, stream.schema)
            metadata = read_metadata(table.schema, where=where)
            identity = Identity.model_validate_json(json.dumps(metadata["identity"]))
            skipped = tuple(SkippedRow(**row) for row in metadata["skipped"])
            units = _units_of(table, identity, _Slots.validate_python(metadata["slots"]))
            facts = _Facts.model_validate({name: metadata[name] for name in _Facts.model_fields})
            return cls(identity, units, skipped, facts.duplicates, facts.base, facts.request, facts.lost)
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise CacheFormatError(f"{where}: cannot be read ({first_line(error)}). {REMEDY}") from error


def _units_of(table: pa.Table, identity: Identity, slots: Sequence[int | None]) -> tuple[Unit, ...]:
    if table.column("key").null_count:
        raise ValueError("a unit without a key")
    batches = table.select(["key"]).to_batches()
    keys = np.concatenate([keys_of(batch) for batch in batches] or [np.empty(0, KEY_DTYPE)])
    rows = table.column("row").to_numpy()
    bounds = np.searchsorted(table.column("unit").to_numpy(), np.arange(len(slots) + 1))
    spans = [slice(int(start), int(stop)) for start, stop in pairwise(bounds)]
    digest = identity.digest()
    return tuple(
        make_unit(digest, keys[span], rows[span], slot=slot)
        for span, slot in zip(spans, slots, strict=True)
        if span.start < span.stop  # an earlier release planned units for lost shards without rows
    )


def make_unit(
    identity_digest: str, keys: Keys, rows: npt.NDArray[np.int64], *, slot: int | None = None
) -> Unit:
    """A unit and its id: 64 bits of a digest over the content identity and the keys in order."""
    key_array = as_key_array(keys)
    digest = hashlib.blake2b(bytes.fromhex(identity_digest) + key_array.tobytes(), digest_size=8)
    return Unit(digest.hexdigest(), key_array, np.asarray(rows, dtype=np.int64), slot)
