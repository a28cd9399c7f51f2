"""Losses over a whole split: sums over all its positions on all ranks, divided once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kd_loss import LossSums
from shared.runtime import World
from stage2_student.training.agreement import in_agreement
from stage2_student.training.feed import MicrobatchSource, feed
from stage2_student.training.order import Slot
from stage2_student.training.step import Losses, forward, reduce_losses
from stage2_student.training.student import StudentWithLoss, reshard


@torch.no_grad()
def validate(
    student: StudentWithLoss,
    source: MicrobatchSource,
    slots: Sequence[Slot],
    world: World,
    *,
    num_workers: int,
) -> Losses:
    """Called by all ranks, with slots of equal number; some may count for nothing."""
    sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=world.device)
    fed = feed(
        source, [[slot] for slot in slots], num_workers=num_workers, pin_memory=world.device.type == "cuda"
    )
    student.eval()
    for step in in_agreement(fed, world):
        (microbatch,) = step.microbatches
        sums += torch.stack([value.double() for value in forward(student, microbatch, world)])
    student.train()
    reshard(student)
    return reduce_losses(sums, world)
