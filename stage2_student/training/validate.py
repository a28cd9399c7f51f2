"""Losses over a whole split: sums over all its positions on all ranks, divided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from shared.kd_loss import LossSums
from shared.progress import progress
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

    Holds    with a cache the teacher's CE is among the losses; so is KL, where it has targets of temperature 1
    """
    sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=world.device)
    kl_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    teacher_ce_sum = 0.0
    fed = feed(
        source, [[slot] for slot in slots], num_workers=num_workers, pin_memory=world.device.type == "cuda"
    )
    student.eval()
    agreed = in_agreement(fed, world)
    for step in progress(
        agreed, total=len(slots), desc="validating", unit="batch", leave=False, disable=not world.is_main
    ):
        one = step.microbatches[0].to(world.device)
        losses, kl = student.measure(one.inputs, one.position_index, one.labels, one.targets)
        sums += torch.stack([value.double() for value in losses])
        kl_sum += 0.0 if kl is None else kl.double()
        teacher_ce_sum += one.teacher_ce
    student.train()
    reshard(student)
    means, cache = reduce_losses(sums, world), source.cache
    teacher = torch.tensor([kl_sum.item(), teacher_ce_sum], dtype=torch.float64)
    dist.all_reduce(teacher)
    kl_mean, teacher_ce = (teacher / max(1, means.num_positions)).tolist()
    has_kl = cache is not None and KL_TEMPERATURE in cache.temperatures
    return replace(means, kl=kl_mean if has_kl else None, teacher_ce=None if cache is None else teacher_ce)
