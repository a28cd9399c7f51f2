"""Losses over a whole split: sums over all its positions on all ranks, divided once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kd_loss import LossSums
from shared.runtime import World
from stage2_student.training.agreement import in_agreement
from stage2_student.training.feed import MicrobatchSource, feed
from stage2_student.training.order import Slot
from stage2_student.training.step import Losses, reduce_losses
from stage2_student.training.student import KL_TEMPERATURE, StudentWithLoss, reshard


@torch.no_grad()
def validate(
    student: StudentWithLoss,
    source: MicrobatchSource,
    slots: Sequence[Slot],
    world: World,
    *,
    num_workers: int,
) -> Losses:
    """Called by all ranks, with slots of equal number; some may count for nothing.

    Holds    KL to the teacher is among the losses where the source has targets of temperature 1
    """
    gives_kl = source.has_targets_at(KL_TEMPERATURE)
    sums = torch.zeros(len(LossSums._fields) + gives_kl, dtype=torch.float64, device=world.device)
    fed = feed(
        source, [[slot] for slot in slots], num_workers=num_workers, pin_memory=world.device.type == "cuda"
    )
    student.eval()
    for step in in_agreement(fed, world):
        (microbatch,) = step.microbatches
        on_device = microbatch.to(world.device)
        losses, kl = student.measure(
            on_device.inputs, on_device.position_index, on_device.labels, on_device.targets
        )
        values = [*losses] if kl is None else [*losses, kl]
        sums += torch.stack([value.double() for value in values])
    student.train()
    reshard(student)
    return reduce_losses(sums, world)
