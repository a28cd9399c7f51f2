"""From a batch's targets to rows, from rows to shards; runs on the writer thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from shared.cache import CacheWriter, Row, Unit
from shared.codec import encode_many
from shared.data.processing import Encoded
from shared.sparse import SparseTargets
from stage1_teacher.capturing.handover import HostCopy
from stage1_teacher.capturing.windows import Refused

TENSOR_FIELDS = ("offsets", "ids", "logprobs", "log_normalizers", "entropy", "draw_counts")


@dataclass(frozen=True, eq=False)
class CapturedBatch:
    """A batch's targets on their way to the host.

    unit_id  of the unit that all its examples belong to
    """

    unit_id: str
    encoded: Sequence[Encoded]
    targets: SparseTargets
    copy: HostCopy

    @classmethod
    def of(
        cls, unit_id: str, encoded: Sequence[Encoded], targets: SparseTargets, ce_N: Tensor
    ) -> CapturedBatch:
        tensors = {name: getattr(targets, name) for name in TENSOR_FIELDS}
        return cls(unit_id, encoded, targets, HostCopy({**tensors, "ce": ce_N}))

    def rows(self) -> list[Row]:
        """The rows of the cache; waits for the copy."""
        tensors: dict[str, Any] = self.copy.wait()
        ce_N = tensors.pop("ce").double()
        targets = replace(self.targets, **tensors)
        offsets = [0, *np.cumsum([one.num_positions for one in self.encoded]).tolist()]
        payloads = encode_many(targets, offsets)
        return [
            Row(
                key=one.key,
                answer_ids=one.answer_ids.numpy().astype(np.int32),
                num_entries=int(targets.offsets[stop] - targets.offsets[start]),
                ce_sum=float(ce_N[start:stop].sum()),
                entropy_sums=targets.entropy[start:stop].double().sum(0).numpy(),
                payload=payload,
                truncated=one.truncated,
            )
            for one, payload, (start, stop) in zip(self.encoded, payloads, pairwise(offsets), strict=True)
        ]


class ShardAssembler:
    """Collects the rows of units and publishes a unit's shard when its last row is there.

    on_rows   called with the rows of each batch, for the progress
    on_shard  called with the unit when its shard is published
    """

    def __init__(
        self,
        writer: CacheWriter,
        units: Sequence[Unit],
        *,
        on_rows: Callable[[list[Row]], None],
        on_shard: Callable[[Unit], None],
    ) -> None:
        self._writer = writer
        self._units = {unit.unit_id: unit for unit in units}
        self._on_rows = on_rows
        self._on_shard = on_shard
        self._rows: dict[str, list[Row]] = {}
        self._refused: dict[str, list[Refused]] = {}

    def take(self, item: CapturedBatch | tuple[str, Refused]) -> None:
        """Takes what the writer thread is handed."""
        if isinstance(item, CapturedBatch):
            unit_id, rows = item.unit_id, item.rows()
            self._rows.setdefault(unit_id, []).extend(rows)
            self._on_rows(rows)
        else:
            unit_id, refused = item
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
        self._on_shard(unit)
