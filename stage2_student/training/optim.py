"""The optimizer and its learning rate.

AdamW over the trainable parameters only; matrices decay, norms and biases (all that has one axis) do not.
The learning rate is a pure function of the step, so a schedule has no state to save.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shared.recipes import OptimizationConfig


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW in its fused form; frozen parameters are not known to it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: dict[tuple[Any, float], list[nn.Parameter]] = {}
    for parameter in trainable:  # the fused form takes those of one mesh together
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((mesh_of(parameter), decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": some, "weight_decay": decay} for (_, decay), some in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def mesh_of(parameter: nn.Parameter) -> DeviceMesh | None:
    """The ranks that hold its parts; None where it is whole."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def learning_rate(config: OptimizationConfig, *, step: int, num_steps: int) -> float:
    """Of the update at ``step``, counted from 0: linear warm-up, then the schedule down to its floor.

    Holds    config.learning_rate at the last step of the warm-up; never above it; the floor would be the
             rate of the step after the last, so that the last one still learns
             a part of the schedule has the rates that the whole one has there, but for a warm-up of its own
    """
    num_warmup, (start, stop) = config.num_warmup_steps, config.schedule_part or (0.0, 1.0)
    whole = num_steps / (stop - start)  # steps of the whole schedule
    done = (start * whole + step + 1 - num_warmup) / max(1, whole + 1 - num_warmup)
    done = min(1.0, max(0.0, done))
    remaining = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }[config.schedule]
    floor = config.min_learning_rate_ratio
    warm = min(1.0, (step + 1) / num_warmup) if num_warmup else 1.0
    return config.learning_rate * (floor + (1 - floor) * remaining) * warm


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
