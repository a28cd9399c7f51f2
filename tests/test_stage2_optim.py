"""The optimizer's groups and the learning rate's course."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shared.recipes import OptimizationConfig
from shared.runtime import distributed
from stage2_student.training.optim import learning_rate, make_optimizer
from stage2_student.training.step import clip_gradients


def config(**values: Any) -> OptimizationConfig:
    return OptimizationConfig(**({"max_steps": 100, "learning_rate": 1.0} | values))


def rates(settings: OptimizationConfig, num_steps: int = 100) -> list[float]:
    return [learning_rate(settings, step=step, num_steps=num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_full_rate_and_no_further(schedule: str) -> None:
    course = rates(config(schedule=schedule, num_warmup_steps=10))
    assert course[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(course) == 1.0
    assert course[10:] == sorted(course[10:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_ends_above_its_floor_so_that_the_last_step_learns(schedule: str) -> None:
    course = rates(config(schedule=schedule, min_learning_rate_ratio=0.1))
    assert 0.1 < course[-1] < 0.12
    assert learning_rate(config(schedule=schedule, min_learning_rate_ratio=0.1), step=100, num_steps=100) == (
        pytest.approx(0.1)
    )


def test_half_way_the_cosine_is_at_half() -> None:
    assert learning_rate(config(), step=49, num_steps=99) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_run_is_only_a_warm_up() -> None:
    assert rates(config(num_warmup_steps=10), num_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_parts_of_a_schedule_have_the_rates_of_the_whole(schedule: str) -> None:
    whole = rates(config(schedule=schedule, num_warmup_steps=5, min_learning_rate_ratio=0.1))
    parts = [
        rates(
            config(schedule=schedule, num_warmup_steps=5, min_learning_rate_ratio=0.1, schedule_part=part), 50
        )
        for part in ((0.0, 0.5), (0.5, 1.0))
    ]
    assert parts[0] == pytest.approx(whole[:50])
    assert parts[1][4:] == pytest.approx(whole[54:])  # behind a warm-up of its own
    assert parts[1][:4] == pytest.approx([rate * (n + 1) / 5 for n, rate in enumerate(whole[50:54])])


def test_a_part_of_a_schedule_must_rise() -> None:
    with pytest.raises(ValueError, match=r"schedule_part \[0.5, 0.5\] has no step"):
        config(schedule_part=(0.5, 0.5))


def test_matrices_decay_norms_and_biases_do_not_and_frozen_parameters_are_unknown() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(model, config(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {
        id(model[0].weight): 0.3,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }


def test_the_norm_of_gradients_in_bf16_is_a_norm_in_fp32() -> None:
    """bf16 has three digits: each step's update would be scaled down by as much too little, or too much."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.empty(size, dtype=torch.bfloat16)) for size in (1000, 30_000, 7)]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
    whole = torch.cat([weight.grad.double() for weight in weights if weight.grad is not None])
    with distributed(device="cpu") as world:
        norm = clip_gradients(nn.ParameterList(weights), world, None)
    assert norm.item() == pytest.approx(whole.norm().item(), rel=1e-5)
