"""From rows to shards: a unit's shard is published when its last row is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.cache import CacheWriter, Row, Unit


@dataclass(frozen=True)
class Refused:
    """An example whose picture cannot be used, and why; ``row`` names it to people, like ``train[17]``."""

    key: bytes
    row: str
    reason: str


class UnitCollector:
    """Rows and refused examples of units, in any order.

    on_shard  called with the unit when its shard is published
    """

    def __init__(
        self, writer: CacheWriter, units: Sequence[Unit], *, on_shard: Callable[[Unit], None] | None = None
    ) -> None:
        self._writer = writer
        self._units = {unit.unit_id: unit for unit in units}
        self._on_shard = on_shard
        self._rows: dict[str, list[Row]] = {}
        self._refused: dict[str, list[Refused]] = {}

    def add(self, unit_id: str, rows: Sequence[Row]) -> None:
        self._rows.setdefault(unit_id, []).extend(rows)
        self._publish_if_whole(self._units[unit_id])

    def refuse(self, unit_id: str, refused: Refused) -> None:
        self._refused.setdefault(unit_id, []).append(refused)
        self._publish_if_whole(self._units[unit_id])

    def _publish_if_whole(self, unit: Unit) -> None:
        rows, refused = self._rows.get(unit.unit_id, []), self._refused.get(unit.unit_id, [])
        if len(rows) + len(refused) < len(unit):
            return
        with self._writer.unit(unit) as shard:
            for row in rows:
                shard.add(row)
            for one in refused:
                shard.skip(one.key, row=one.row, reason=one.reason)
        self._rows.pop(unit.unit_id, None)
        self._refused.pop(unit.unit_id, None)
        if self._on_shard is not None:
            self._on_shard(unit)
