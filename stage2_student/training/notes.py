"""What a student's weights and settings come to that nobody would guess: told by ``check``, and as a run starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel

from shared.model_notes import notes_on_files
from shared.models.router import RouterLoss, num_experts
from shared.models.vlm import load_config
from shared.recipes import Recipe
from stage2_student.training.lora import out_of_reach
from stage2_student.training.survey import Survey

# A bfloat16 has 8 bits: a number is a 128th to a 256th of itself away from the next, and half of that rounds back.
LOST_BELOW = (1 / 512, 1 / 256)
# Of a weight that may be moved: above it none of usual size is lost.
SAFE_LEARNING_RATE = 1e-3


def notes_on(model: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    """One for each.  The model may be on the meta device, or sharded; what is trained has been chosen."""
    if recipe.student.lora is not None and (missed := out_of_reach(model)):
        yield _out_of_reach(missed)
    yield from _router(model)
    yield from _low_precision(recipe)


def notes_at_start(model: PreTrainedModel, recipe: Recipe, surveys: Iterable[Survey]) -> Iterator[str]:
    """The same, what became of the student's files, and examples that are too long for it."""
    student = recipe.student
    config = load_config(student.model, student.revision)
    yield from notes_on_files(config, surveys, whose=f"student {student.model}", dequantize=True)
    yield from notes_on(model, recipe)


def _out_of_reach(missed: dict[str, int]) -> str:
    listed = ", ".join(f"{name} ({number:,} parameters)" for name, number in missed.items())
    return (
        f"lora reaches linear layers; these parts of the language model are none and keep their weights: {listed}. "
        "To adapt them too, name them in student.lora.target_parameters"
    )


def _router(model: PreTrainedModel) -> Iterator[str]:
    number, router = num_experts(model), RouterLoss.of(model)
    if router is not None:
        yield (
            f"the router's load-balancing loss counts {router.coefficient:g} times beside the loss, as the model's "
            "configuration asks (router_aux_loss_coef)"
        )
    elif number:
        yield (
            f"the model has {number} experts, and no load-balancing loss is part of the loss: its configuration does "
            "not ask for one (output_router_logits and router_aux_loss_coef in config.json), or its class has none"
        )


def _low_precision(recipe: Recipe) -> Iterator[str]:
    rate = recipe.optimization.learning_rate
    if recipe.student.param_dtype == "float32" or rate >= SAFE_LEARNING_RATE:
        return
    low, high = (rate / share for share in LOST_BELOW[::-1])
    yield (
        f"student.param_dtype {recipe.student.param_dtype} loses updates at learning_rate {rate:g}: a step moves a "
        f"weight by about that much, and is rounded away for weights above {low:.2g} to {high:.2g}. float32 keeps all"
    )
