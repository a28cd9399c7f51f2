"""The first step of a recipe on the ranks of a world: its loss, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.recipes import Recipe
from shared.runtime import World
from stage2_student.training.feed import Microbatch
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.order import step_shape, training_slots
from stage2_student.training.step import accumulate, clip_gradients
from stage2_student.training.student import build_student


class FirstStep(NamedTuple):
    """gradients  whole, by name; on the first rank alone"""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def first_step(recipe: Recipe, world: World) -> FirstStep:
    """Called by all ranks."""
    inputs, world = opened(recipe, world)
    student = build_student(recipe, world, num_token_ids=inputs.processor.num_token_ids)
    microbatches = microbatches_of(recipe, inputs, world)
    counts = counts_of(microbatches, world)
    sums = accumulate(student, microbatches, world, **counts)
    loss = sums.means(student.router, world, num_tokens=counts["num_tokens"]).loss
    norm = clip_gradients(student, world, None).item()
    trained = [(name, p) for name, p in student.model.named_parameters() if p.grad is not None]
    gradients = {name: parameter.grad.full_tensor() for name, parameter in trained}
    del student, trained
    world.release_memory()
    return FirstStep(loss, norm, gradients if world.is_main else {})


def opened(recipe: Recipe, world: World) -> tuple[Inputs, World]:
    world = world.with_tensor(recipe.parallel.tensor)
    return open_inputs(recipe, world), world


def microbatches_of(recipe: Recipe, inputs: Inputs, world: World) -> list[Microbatch]:
    """Of this rank, of the first step."""
    shape, source = step_shape(recipe, inputs.train.num_examples), inputs.training_source()
    (slots,) = training_slots(
        shape,
        inputs.train.work(0.0, packed=inputs.packing),
        steps=range(1),
        rank=world.data_rank,
        num_ranks=world.num_data_ranks,
    )
    found = [source[slot] for slot in slots]
    assert all(isinstance(one, Microbatch) for one in found)
    return found  # type: ignore[return-value]


def counts_of(microbatches: Sequence[Microbatch], world: World) -> dict[str, int]:
    """Positions, those of them that are kept, and tokens of all ranks."""
    names = ("num_positions", "num_kept", "num_tokens")
    own = [sum(getattr(m, name) for m in microbatches) for name in names]
    return dict(zip(names, world.sum_over_data(torch.tensor(own)).tolist(), strict=True))


def differences(ours: FirstStep, theirs: FirstStep) -> dict[str, float]:
    """How far each gradient is off, as a share of its size; all have the same parameters.

    Some are zero but for rounding, as a key's bias, which no softmax sees: at least a hundred-thousandth of the whole
    gradient's size counts.
    """
    assert ours.gradients.keys() == theirs.gradients.keys()
    return {
        name: (ours.gradients[name] - whole).norm().item() / max(whole.norm().item(), 1e-5 * theirs.norm)
        for name, whole in theirs.gradients.items()
    }
