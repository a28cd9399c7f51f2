"""A way to teach a student that is not a cache of this package: what it brings to a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.kd_loss import LossSums
from shared.models.vlm import Head
from shared.recipes import Recipe
from shared.runtime import World
from stage2_student.training.feed import Microbatch
from stage2_student.training.inputs import Inputs
from stage2_student.training.student import Forwarded

Change = Callable[[Microbatch], Microbatch]


def _same(microbatch: Microbatch) -> Microbatch:
    return microbatch


@dataclass(frozen=True)
class Lesson:
    """A method at work in one training.

    read                what loader workers do elsewhere, and is not timed: targets from files
    teach               what a step does before the student's forward pass, such as the teacher's own
    forward             of ``StudentWithLoss``, in the place of its own; None: that one, with the targets
    bytes_per_position  of all files but those that are there once, whatever the number of positions
    once_bytes          of those files
    held_bytes          of the teacher's weights that are in memory while the student trains
    """

    read: Change = _same
    teach: Change = _same
    forward: Callable[..., Forwarded] | None = None
    bytes_per_position: float | None = None
    once_bytes: int = 0
    held_bytes: int = 0


class Method(Protocol):
    """Small and frozen, as it is sent to other processes."""

    def open(self, recipe: Recipe, inputs: Inputs, world: World, folder: Path) -> Lesson:
        """For one training; ``folder`` has what the method has stored, if it stores anything."""


def forwarded(loss: Tensor, ce: Tensor, kd: Tensor, num_positions: int) -> Forwarded:
    """Sums over positions; what else a step counts is zero."""
    zero = torch.zeros((), device=loss.device)
    count = torch.tensor(num_positions, device=loss.device)
    return Forwarded(LossSums(loss, ce.detach(), kd.detach(), zero, count, zero, zero), None)


def plain_weight(head: Head, num_ids: int) -> Tensor:
    """The rows of the first ids, of a head that is a matrix and nothing else.

    Raises   ValueError  when it is not, as losses that take a matrix would be wrong
    """
    if head.bias_V is not None or head.scale != 1.0 or head.softcap is not None:
        raise ValueError("the head has a bias, a scale or a softcap; this loss takes its matrix alone")
    weight_VD = head.weight_VD
    return weight_VD if len(weight_VD) == num_ids else weight_VD[:num_ids]
