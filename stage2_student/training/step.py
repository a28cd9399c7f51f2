"""One training step: microbatches in, one update out, or none if a number is not finite.

The loss of a step is a sum over its positions on all ranks, divided once by their number.  How the step is
cut into ranks and microbatches therefore changes its gradient by rounding only.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.kd_loss import LossSums
from shared.models.router import RouterLoss
from shared.other_vocabulary import Coverage
from shared.runtime import World
from stage2_student.training.feed import Microbatch
from stage2_student.training.optim import mesh_of
from stage2_student.training.student import Forwarded, StudentWithLoss


@dataclass(frozen=True)
class Losses:
    """Means over positions, of all ranks; nats.  In training over those that are trained on, each by its weight.

    loss  what is minimised, the router's loss times its coefficient among it
    kd  carries the factor temperature squared
    kl  to the teacher at temperature 1; None where it was not measured
    soft_ce  with a teacher of another tokenizer at temperature 1, of shared positions, nats a unit of its mass
    coverage  of the positions by that teacher's targets; None where there is no such teacher
    teacher_ce  the teacher's own cross-entropy; None where no cache tells it
    router  the load-balancing loss of a router, a mean over tokens; None without one
    reverse_kl  sampled, a mean over the positions that the student wrote; None where there was none
    """

    loss: float
    ce: float
    kd: float
    teacher_entropy: float
    num_positions: int
    kl: float | None = None
    teacher_ce: float | None = None
    router: float | None = None
    reverse_kl: float | None = None
    soft_ce: float | None = None
    coverage: Coverage | None = None


class Sums:
    """Of this rank's microbatches, until they are divided by what all ranks have counted."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=device)
        self.router = torch.zeros((), dtype=torch.float64, device=device)
        self.coverage: Coverage | None = None

    def add(self, losses: LossSums, router: Tensor | None, coverage: Coverage | None = None) -> None:
        self.losses += torch.stack([value.detach().double() for value in losses])
        if router is not None:
            self.router += router.detach().double()
        if coverage is not None:
            self.coverage = (self.coverage or Coverage()) + coverage

    def means(self, router: RouterLoss | None, world: World, *, num_tokens: int) -> Losses:
        """Of all ranks, which call it together; ``num_tokens`` is that of all."""
        total = torch.cat(
            [self.losses, self.router[None]]
        ).cpu()  # the step's one wait for the device but the norm's
        if self.coverage is not None:
            total = torch.cat([total, torch.tensor(self.coverage.values(), dtype=torch.float64)])
        loss, ce, kd, teacher_entropy, count, reverse_kl, num_drawn, routed, *covered = world.sum_over_data(
            total
        ).tolist()
        num_positions = round(count)
        scale = 1 / max(1, num_positions)
        means = Losses(
            *(loss * scale, ce * scale, kd * scale, teacher_entropy * scale, num_positions),
            reverse_kl=reverse_kl / num_drawn if num_drawn else None,
            coverage=Coverage(*covered) if covered else None,
        )
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
    num_kept: int | None = None,
) -> StepResult:
    """Called by all ranks with the same number of microbatches; the numbers are of all ranks.

    num_kept  positions that are trained on: those with KD, and with CE unless that is over all; None: all
    """
    sums = accumulate(
        student, microbatches, world, num_positions=num_positions, num_kept=num_kept, num_tokens=num_tokens
    )
    reduced = sums.means(student.router, world, num_tokens=num_tokens)
    grad_norm = clip_gradients(student, world, max_grad_norm)
    # The norm is of all ranks' gradients and the losses are summed over ranks, so all of them decide alike.
    updated = bool(torch.isfinite(grad_norm)) and all(
        map(
            torch.isfinite,
            torch.tensor([reduced.ce, reduced.kd, reduced.router or 0.0, reduced.reverse_kl or 0.0]),
        )
    )
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(reduced, grad_norm.item(), updated)


def accumulate(
    student: StudentWithLoss,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    num_positions: int,
    num_tokens: int,
    num_kept: int | None = None,
) -> Sums:
    """Gradients of a step's loss, and the sums it is made of.

    Both losses are divided by the number of positions with CE, so KD at fewer of them is scaled up to be a mean, too.
    Gradients are kept on each rank until the last microbatch, and reduced once.
    """
    sums = Sums(world.device)
    num_kept = num_positions if num_kept is None else num_kept
    num_with_ce = num_kept if student.trains_on_kept else num_positions
    kd_scale = num_with_ce / max(1, num_kept)
    for index, microbatch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        student.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # fully_shard adds these
        student.set_is_last_backward(is_last)  # type: ignore[operator]
        losses, router = forward(student, microbatch, world, kd_scale=kd_scale)
        loss = losses.loss / max(1, num_with_ce)
        if router is not None and student.router is not None:
            loss = loss + student.router.coefficient * router / max(1, num_tokens)
        loss.backward()
        sums.add(losses, router, microbatch.coverage)
    return sums


def forward(student: nn.Module, microbatch: Microbatch, world: World, *, kd_scale: float = 1.0) -> Forwarded:
    one = microbatch.to(world.device)
    weighing = one.weighing and replace(one.weighing, kd_scale=kd_scale)
    fed = (one.inputs, one.position_index, one.labels, one.targets, one.num_rows)
    return student(*fed, one.label_logprobs, weighing)


def seed_step(seed: int, *, step: int, data_rank: int) -> None:
    """Makes what is random in a step (dropout) a function of it, so that no stream's state need be saved."""
    digest = hashlib.blake2b(f"{seed} {step} {data_rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def clip_gradients(student: nn.Module, world: World, max_grad_norm: float | None) -> Tensor:
    """The global norm of all gradients, () fp32, before they are scaled down to ``max_grad_norm``.

    Gradients lie on several meshes, and some are whole on several ranks: each rank adds up its own parts, each
    divided by the number of ranks that have the same one.
    """
    trained = [parameter for parameter in student.parameters() if parameter.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=world.device)
    for num_copies, some in _grouped(trained, lambda p: _num_copies(p.grad, world)).items():
        norm = _norm([_own_part(p.grad) for p in some])
        square += norm.to(square) ** 2 / num_copies
    dist.all_reduce(square)
    norm = square.sqrt().float()
    if max_grad_norm is not None:
        for some in _grouped(trained, mesh_of).values():  # torch scales those of one mesh together
            torch.nn.utils.clip_grads_with_norm_(some, max_grad_norm, norm)
    return norm


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all of them together, () fp32; torch gives one in their own dtype, of three digits in bf16."""
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    return torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in tensors]).norm()


def _grouped(parameters: Iterable[nn.Parameter], key: Callable[[Any], Any]) -> dict[Any, list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[key(parameter)].append(parameter)
    return groups


def _own_part(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_copies(tensor: Any, world: World) -> int:
    """How many ranks have the same part of it as this one."""
    if not isinstance(tensor, DTensor):
        return world.size
    axes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return world.size // math.prod(size for placement, size in axes if not placement.is_replicate())
