"""A head whose vocabulary is split over ranks: what each rank holds, and the few sums they exchange.

Ranks exchange numbers per position and per entry, never logits: the largest logit, the normaliser, and the
logits of labels and entries (zero where they live elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from shared.errors import RecipeError


@dataclass(frozen=True)
class VocabShard:
    """This rank's ids are ``start`` to ``start + num_ids`` of ``total_ids``; ``group`` holds all of them."""

    group: dist.ProcessGroup
    start: int
    num_ids: int
    total_ids: int

    @classmethod
    def agree(cls, group: dist.ProcessGroup, num_ids: int, labels: Tensor) -> VocabShard:
        """Ranks hold their ids in rank order; how many may differ.  All must bring the same labels.

        Raises   RecipeError  on every rank, where labels differ: then the split is not over the vocabulary
        """
        places = torch.arange(1, labels.numel() + 1, device=labels.device)
        mine = torch.stack([labels.new_tensor(num_ids), places.sum(), (labels.reshape(-1) * places).sum()])
        facts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(facts, mine, group=group)
        sizes, *fingerprints = torch.stack(facts).t().tolist()
        if any(len(set(fingerprint)) > 1 for fingerprint in fingerprints):
            raise RecipeError(
                "the head is split over ranks that do not have the same labels; a split over the vocabulary "
                "needs the same positions on each. If FSDP split it, compute the loss in the root's forward"
            )
        if min(sizes) == 0:
            raise RecipeError(f"the head's rows are split as {sizes}: each rank needs at least one")
        return cls(group, sum(sizes[: dist.get_rank(group)]), num_ids, sum(sizes))

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


def local_part(
    tensor: Tensor, dim: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's part of a tensor, and the group over which a DTensor splits ``dim`` (else ``group``).

    Raises   RecipeError  for a DTensor split along another dimension, over two mesh axes, or not yet summed
    """
    if not isinstance(tensor, DTensor):
        return tensor, group
    dim %= tensor.ndim
    axes = [i for i, placement in enumerate(tensor.placements) if placement == Shard(dim)]
    others = [p for i, p in enumerate(tensor.placements) if i not in axes]
    if len(axes) > 1 or not all(placement == Replicate() for placement in others):
        raise RecipeError(
            f"a DTensor of shape {tuple(tensor.shape)} is placed as {tensor.placements}; the loss needs it "
            f"whole, or split along dimension {dim} over one mesh axis"
        )
    return tensor.to_local(), tensor.device_mesh.get_group(axes[0]) if axes else group
