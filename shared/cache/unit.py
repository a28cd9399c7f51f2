"""The rows of one unit, published together."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from shared.cache.format import sha256_hex
from shared.cache.identity import Identity
from shared.cache.layout import shard_name
from shared.cache.manifest import SkippedRow
from shared.cache.plan import Unit
from shared.cache.shard import MAX_PAYLOAD_BYTES, Row, encode_shard
from shared.cache.storage import Folder
from shared.errors import RecipeError


class UnitWriter:
    """Collects a unit's rows, and publishes them together when its ``with`` block ends without an
    exception.
    """

    def __init__(
        self, folder: Folder, unit: Unit, identity: Identity, *, on_published: Callable[[str], None]
    ) -> None:
        self._folder, self._unit, self._identity = folder, unit, identity
        self._on_published = on_published
        self._rows: dict[bytes, Row] = {}
        self._skipped: dict[bytes, SkippedRow] = {}
        self._missing = set(unit.keys)
        self._payload_bytes = 0

    @property
    def is_whole(self) -> bool:
        """Whether each of the unit's examples is there, or left out."""
        return not self._missing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()

    def add(self, row: Row) -> None:
        """Takes a row, in any order.

        Raises   ValueError   for a key of another unit, or a second time
                 RecipeError  as soon as the unit's payloads are more than a shard holds
        """
        self._claim(row.key)
        self._rows[row.key] = row
        self._payload_bytes += len(row.payload)
        if self._payload_bytes > MAX_PAYLOAD_BYTES:
            raise RecipeError(
                f"{self._folder.where}: the entries of {len(self._rows)} examples take {self._payload_bytes} bytes, "
                f"a shard was to hold {len(self._unit)} examples and holds {MAX_PAYLOAD_BYTES} bytes of entries at "
                "most. Set cache.examples_per_shard lower; what is finished stays"
            )

    def skip(self, key: bytes, *, row: str, reason: str) -> None:
        """Leaves an example out; ``row`` names it to people, like ``train[17]``."""
        self._claim(key)
        self._skipped[key] = SkippedRow(row=row, reason=reason, key=key.hex())

    def _claim(self, key: bytes) -> None:
        if key not in self._missing:
            raise ValueError(f"unit {self._unit.unit_id}: key {key.hex()} is not one of its, or came twice")
        self._missing.remove(key)

    def _publish(self) -> None:
        if self._missing:
            raise ValueError(
                f"unit {self._unit.unit_id}: {len(self._missing)} of {len(self._unit)} rows are missing"
            )
        keys = self._unit.keys
        skipped = [self._skipped[key].model_dump() for key in keys if key in self._skipped]
        data = encode_shard(
            [self._rows[key] for key in keys if key in self._rows],
            num_temperatures=len(self._identity.targets.temperatures),
            optional=self._identity.targets.columns,
            metadata={"unit": self._unit.unit_id, "identity": self._identity.content(), "skipped": skipped},
        )
        name = shard_name(self._unit.unit_id, sha256_hex(data))
        self._folder.publish(name, data)
        self._on_published(name)
