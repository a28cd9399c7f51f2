"""One training step: microbatches in, one update out, or none if a number is not finite.

The loss of a step is a sum over its positions on all ranks, divided once by their number.  How the step is
cut into ranks and microbatches therefore changes its gradient by rounding only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.kd_loss import LossSums
from shared.models.router import RouterLoss
from shared.runtime import World
from stage2_student.training.feed import Microbatch
from stage2_student.training.student import Forwarded, StudentWithLoss


@dataclass(frozen=True)
class Losses:
    """Means over positions, of all ranks; nats.

    loss  what is minimised, the router's loss times its coefficient among it
    kd  carries the factor temperature squared
    kl  to the teacher at temperature 1; None where it was not measured
    teacher_ce  the teacher's own cross-entropy; None where no cache tells it
    router  the load-balancing loss of a router, a mean over tokens; None without one
    """

    loss: float
    ce: float
    kd: float
    teacher_entropy: float
    num_positions: int
    kl: float | None = None
    teacher_ce: float | None = None
    router: float | None = None


class Sums:
    """Of this rank's microbatches, until they are divided by what all ranks have counted."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=device)
        self.router = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, losses: LossSums, router: Tensor | None) -> None:
        self.losses += torch.stack([value.detach().double() for value in losses])
        if router is not None:
            self.router += router.detach().double()

    def means(self, router: RouterLoss | None, *, num_tokens: int) -> Losses:
        """Of all ranks, which call it together; ``num_tokens`` is that of all."""
        total = torch.cat(
            [self.losses, self.router[None]]
        ).cpu()  # the step's one wait for the device but the norm's
        dist.all_reduce(total)
        loss, ce, kd, teacher_entropy, count, routed = total.tolist()
        num_positions = round(count)
        scale = 1 / max(1, num_positions)
        means = Losses(loss * scale, ce * scale, kd * scale, teacher_entropy * scale, num_positions)
        if router is None:
            return means
        router_loss = routed / max(1, num_tokens)
        return replace(means, loss=means.loss + router.coefficient * router_loss, router=router_loss)


@dataclass(frozen=True)
class StepResult:
    losses: Losses
    grad_norm: float  # before clipping
    updated: bool  # False where a number was not finite: parameters and optimizer are as before


def train_step(
    student: StudentWithLoss,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    num_positions: int,
    num_tokens: int,
    max_grad_norm: float | None,
) -> StepResult:
    """Called by all ranks with the same number of microbatches; the two numbers are of all ranks.

    Gradients are kept on each rank until the last microbatch, and reduced once.
    """
    sums = Sums(world.device)
    for index, microbatch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        student.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # fully_shard adds these
        student.set_is_last_backward(is_last)  # type: ignore[operator]
        losses, router = forward(student, microbatch, world)
        loss = losses.loss / max(1, num_positions)
        if router is not None and student.router is not None:
            loss = loss + student.router.coefficient * router / max(1, num_tokens)
        loss.backward()
        sums.add(losses, router)
    reduced = sums.means(student.router, num_tokens=num_tokens)
    grad_norm = _clip(student, max_grad_norm)
    # The norm is of all ranks' gradients and the losses are summed over ranks, so all of them decide alike.
    updated = bool(torch.isfinite(grad_norm)) and all(
        map(torch.isfinite, torch.tensor([reduced.ce, reduced.kd, reduced.router or 0.0]))
    )
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(reduced, grad_norm.item(), updated)


def forward(student: nn.Module, microbatch: Microbatch, world: World) -> Forwarded:
    one = microbatch.to(world.device)
    return student(one.inputs, one.position_index, one.labels, one.targets, one.num_rows)


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Makes what is random in a step (dropout) a function of it, so that no stream's state need be saved."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _clip(student: nn.Module, max_grad_norm: float | None) -> Tensor:
    """The global norm of all gradients, () fp32, before they are scaled down to ``max_grad_norm``."""
    trained = [parameter for parameter in student.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    return norm
