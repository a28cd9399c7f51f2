"""Losses over a whole split: sums over all its positions on all ranks, divided once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.kd_loss import FORWARD_KL
from shared.kd_loss.teacher import sparse_teacher
from shared.progress import progress
from shared.reports.reliability import NUM_BINS, Reliability
from shared.runtime import World
from shared.sparse import RegroupedTargets
from stage2_student.training.agreement import in_agreement
from stage2_student.training.feed import MicrobatchSource, feed
from stage2_student.training.groups import Groups
from stage2_student.training.order import Slot
from stage2_student.training.reliability import teacher_reliability, tells_probabilities
from stage2_student.training.step import Losses, Sums
from stage2_student.training.student import KL_TEMPERATURE, StudentWithLoss, reshard


@dataclass(frozen=True)
class Validation:
    """The student's losses and calibration, and the teacher's calibration on the same positions, from the cache.

    groups  CE and KL by place in the answer and kind of question
    """

    losses: Losses
    groups: Groups
    reliability: Reliability
    teacher_reliability: Reliability | None

    def details(self) -> dict[str, Any]:
        """As the log holds them, and reports draw them."""
        teacher = self.teacher_reliability
        return {
            **self.groups.to_json(),
            "reliability": self.reliability.to_json(),
            "teacher_reliability": None if teacher is None else teacher.to_json(),
        }


@torch.no_grad()
def validate(
    student: StudentWithLoss,
    source: MicrobatchSource,
    slots: Sequence[Slot],
    world: World,
    *,
    num_workers: int,
    on_refused: Callable[[list[str]], None] = lambda reasons: None,
) -> Validation:
    """Called by all ranks, with slots of equal number; some may count for nothing.

    on_refused  as ``in_agreement`` has it

    Holds    with a cache the teacher's CE is among the losses; so is KL, where it has targets of temperature 1.  Of a
             teacher with another tokenizer ``soft_ce`` stands in the place of KL
    """
    sums, num_tokens = Sums(world.device), 0
    kl_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    soft_ce_sum, mass_sum = torch.zeros_like(kl_sum), torch.zeros_like(kl_sum)
    groups, teacher_ce_sum = Groups(), 0.0
    own_3B = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=world.device)
    teacher_3B = torch.zeros_like(own_3B)
    fed = feed(
        source, [[slot] for slot in slots], num_workers=num_workers, pin_memory=world.device.type == "cuda"
    )
    student.eval()
    agreed = in_agreement(fed, world, on_refused=on_refused)
    for step in progress(
        agreed, total=len(slots), desc="validating", unit="batch", leave=False, disable=not world.is_main
    ):
        one = step.microbatches[0].to(world.device)
        with source.naming_rows([one]):
            found = student.measure(one.inputs, one.position_index, one.labels, one.targets, one.num_rows)
        sums.add(found.losses, found.router, one.coverage)
        num_tokens += step.num_tokens
        kl_sum += 0.0 if found.kl_N is None else found.kl_N.double().sum()
        if found.soft_ce_N is not None and isinstance(one.targets, RegroupedTargets):
            soft_ce_sum += found.soft_ce_N.double().sum()
            mass_sum += _mass(one.targets, student)
        groups.add(one, found.ce_N, found.kl_N)
        teacher_ce_sum += one.teacher_ce
        own_3B += found.reliability
        if one.targets is not None and tells_probabilities(one.targets):
            teacher_3B += teacher_reliability(one.targets, one.labels)
    student.train()
    reshard(student)
    means, cache = sums.means(student.router, world, num_tokens=num_tokens), source.cache
    teacher = torch.tensor(
        [kl_sum.item(), teacher_ce_sum, soft_ce_sum.item(), mass_sum.item()], dtype=torch.float64
    )
    kl_of_all, teacher_ce, soft_ce, mass = world.sum_over_data(teacher).tolist()
    count, coverage = max(1, means.num_positions), means.coverage
    has_kl = cache is not None and KL_TEMPERATURE in cache.temperatures
    losses_of_all = replace(
        means,
        kl=kl_of_all / count if has_kl and coverage is None else None,
        teacher_ce=None if cache is None else teacher_ce / count,
        soft_ce=soft_ce / mass if mass else None,
    )
    own, teachers = _reliability(own_3B, world), _reliability(teacher_3B, world)
    return Validation(
        losses_of_all, groups.of_all_ranks(world), own, teachers if any(teachers.count) else None
    )


def _mass(targets: RegroupedTargets, student: StudentWithLoss) -> Tensor:
    """() fp64, the teacher's at shared positions as the loss takes it: ``renormalize`` comes before the map."""
    teacher = sparse_teacher(
        targets,
        temperature=KL_TEMPERATURE,
        divergence=FORWARD_KL,
        tail=student.loss.tail_mode,
        num_vocab_ids=student.num_token_ids,
        dtype=torch.float32,
    )
    return (teacher.rows.total_N * targets.is_shared_N).double().sum()


def _reliability(sums_3B: Tensor, world: World) -> Reliability:
    """Of all ranks."""
    total_3B = world.sum_over_data(sums_3B.cpu())
    return Reliability(*(tuple(row) for row in total_3B.tolist()))
