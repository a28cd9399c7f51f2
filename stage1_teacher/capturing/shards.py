"""From a batch's targets to rows, from rows to shards; runs on the writer thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from shared.cache import CacheWriter, Row, Unit
from shared.capture.targets import rows_of
from shared.capture.units import Refused, UnitCollector
from shared.data.collation import Encoded
from shared.sparse import SparseTargets
from stage1_teacher.capturing.handover import HostCopy

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
        cls,
        unit_id: str,
        encoded: Sequence[Encoded],
        targets: SparseTargets,
        ce_N: Tensor,
        gain_N: Tensor | None = None,
    ) -> CapturedBatch:
        tensors = {name: getattr(targets, name) for name in TENSOR_FIELDS}
        gain = {} if gain_N is None else {"gain": gain_N}
        return cls(unit_id, encoded, targets, HostCopy({**tensors, "ce": ce_N, **gain}))

    def rows(self) -> list[Row]:
        """The rows of the cache; waits for the copy."""
        tensors: dict[str, Any] = self.copy.wait()
        ce_N, gain_N = tensors.pop("ce"), tensors.pop("gain", None)
        return rows_of(self.encoded, replace(self.targets, **tensors), ce_N, gain_N)


class ShardAssembler(UnitCollector):
    """Takes what the writer thread is handed.

    on_rows  called with the rows of each batch, for the progress
    """

    def __init__(
        self,
        writer: CacheWriter,
        units: Sequence[Unit],
        *,
        on_rows: Callable[[list[Row]], None],
        on_shard: Callable[[Unit], None],
    ) -> None:
        super().__init__(writer, units, on_shard=on_shard)
        self._on_rows = on_rows

    def take(self, item: CapturedBatch | tuple[str, Refused]) -> None:
        if isinstance(item, CapturedBatch):
            rows = item.rows()
            self._on_rows(rows)
            self.add(item.unit_id, rows)
        else:
            self.refuse(*item)
