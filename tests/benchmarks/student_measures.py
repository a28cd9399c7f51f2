"""A trained student beside its teacher's whole distributions on held-out rows.

    found = measure(plain_model(recipe, student), recipe, inputs, world, num_examples=None)

Legend: N answer positions of a microbatch, B examples, S tokens, D hidden size, V ids that the tokenizer knows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shared.dealing import Limits
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.recipes import Recipe
from shared.runtime import World
from stage1_teacher.capturing.teacher import load_teacher
from stage2_student.training.feed import Microbatch, MicrobatchSource
from stage2_student.training.inputs import Inputs
from stage2_student.training.order import pass_slots
from stage2_student.training.student import StudentWithLoss
from stage2_student.training.survey import Survey


def held_out_logprobs(recipe: Recipe, inputs: Inputs, world: World) -> Iterator[Tensor]:
    """The teacher's log-probs (N, V) of each held-out microbatch, in order."""
    assert recipe.teacher is not None
    num_ids = inputs.processor.num_token_ids
    teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)
    for one in held_out(inputs):
        yield teacher.logprobs(teacher.hidden(one))  # type: ignore[arg-type]


def held_out(inputs: Inputs) -> Iterable[Microbatch]:
    assert inputs.validation is not None
    return one_pass(inputs.validation, inputs.validation_source())


def one_pass(survey: Survey, source: MicrobatchSource) -> Iterable[Microbatch]:
    """The examples of a split, each once and without targets: whole distributions are asked for."""
    source.cache = None
    slots = pass_slots(survey.work(0.0, packed=False), limits=Limits(examples=8), rank=0, num_ranks=1)
    return (source.microbatch(slot, [int(survey.rows[i]) for i in slot.examples]) for slot in slots)


def plain_model(recipe: Recipe, student: StudentWithLoss) -> PreTrainedModel:
    model = load_vlm(recipe.student.model, revision=None, dtype=torch.float32, attn_implementation=None)
    state = student.model.state_dict()
    model.load_state_dict(
        {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state.items()}
    )
    return model.eval()


@torch.inference_mode()
def measure(
    model: PreTrainedModel, recipe: Recipe, inputs: Inputs, world: World, *, num_examples: int | None
) -> dict[str, float | None]:
    """KL from the teacher's whole distributions and CE, nats a position; accuracy: of the held-out split, or so many
    of its rows.

    An answer is right when every token of it is the most likely one, the end of the turn among them: that is
    when greedy decoding gives the reference to the letter.
    """
    assert inputs.validation is not None
    inputs = replace(inputs, validation=inputs.validation.spread(num_examples))
    assert inputs.validation is not None
    teacher = held_out_logprobs(recipe, inputs, world)
    body, head = split(model)
    kl = ce = 0.0
    count, right = 0, []
    for microbatch, teacher_NV in zip(held_out(inputs), teacher, strict=True):
        hidden_BSD = last_hidden_states(body, microbatch.inputs)
        hidden_ND = hidden_BSD.flatten(0, 1)[microbatch.position_index]
        logq_NV = head.logits(hidden_ND)[:, : teacher_NV.shape[1]].float().log_softmax(-1)
        kl += F.kl_div(logq_NV, teacher_NV, reduction="sum", log_target=True).item()
        ce += F.nll_loss(logq_NV, microbatch.labels, reduction="sum").item()
        count += microbatch.num_positions
        example_N = microbatch.position_index // hidden_BSD.shape[1]
        hit_N = logq_NV.argmax(-1) == microbatch.labels
        for place, example in enumerate(microbatch.slot.examples):
            row = inputs.validation.split[int(inputs.validation.rows[example])]
            if len(row.answer.split()) <= recipe.evaluation.short_answer_words:
                right.append(bool(hit_N[example_N == place].all()))
        del teacher_NV, logq_NV  # before the next ones are made
    return {"kl": kl / count, "ce": ce / count, "accuracy": statistics.fmean(right) if right else None}
