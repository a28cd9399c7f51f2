"""From rows to shards: a unit's shard is published when its last row is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.cache import CacheWriter, Row, Unit
from shared.cache.unit import UnitWriter


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
        self._begun: dict[str, UnitWriter] = {}

    def add(self, unit_id: str, rows: Sequence[Row]) -> None:
        shard = self._shard(unit_id)
        for row in rows:
            shard.add(row)
        self._publish_if_whole(unit_id)

    def refuse(self, unit_id: str, refused: Refused) -> None:
        self._shard(unit_id).skip(refused.key, row=refused.row, reason=refused.reason)
        self._publish_if_whole(unit_id)

    def _shard(self, unit_id: str) -> UnitWriter:
        if unit_id not in self._begun:
            self._begun[unit_id] = self._writer.unit(self._units[unit_id])
        return self._begun[unit_id]

    def _publish_if_whole(self, unit_id: str) -> None:
        if not self._begun[unit_id].is_whole:
            return
        with self._begun[unit_id]:
            pass  # its rows are there
        del self._begun[unit_id]
        if self._on_shard is not None:
            self._on_shard(self._units[unit_id])
