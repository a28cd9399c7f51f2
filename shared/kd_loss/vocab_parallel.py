"""A head whose vocabulary is split over ranks: what each rank holds, and the few sums they exchange.

Rank r holds the ids from ``start`` on.  Ranks exchange numbers per position and per entry, never logits:
the largest logit, the normaliser, and the logits of labels and entries (zero where they live elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's ids are ``start`` to ``start + num_ids``; ``group`` holds all of them."""

    group: dist.ProcessGroup
    start: int
    num_ids: int

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, num_local_ids: int, device: torch.device) -> VocabShard:
        """Ranks in order, each with as many ids as its part of the head has rows (they may differ)."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([num_local_ids], device=device), group=group)
        rank = dist.get_rank(group)
        return cls(group, int(sum(int(size) for size in sizes[:rank])), num_local_ids)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as columns of this rank (0 where they live elsewhere), and which of them are here."""
        local_ids = ids - self.start
        here = (local_ids >= 0) & (local_ids < self.num_ids)
        return local_ids * here, here
