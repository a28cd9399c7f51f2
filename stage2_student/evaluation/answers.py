"""A model answers questions, greedily, in batches; each answer is held against the data set's.

    answers = answers_of(recipe, source, world, split="validation")

A model is opened from its Hugging Face folder, as its users will open it.  An answer is right when it equals the
reference but for case, punctuation and spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from shared import answering
from shared.answering import forget_settings, own_ends
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example, VqaSplit
from shared.errors import TeachonceError, is_out_of_memory
from shared.models.vlm import load_vlm
from shared.progress import progress
from shared.recipes import Recipe, Split
from shared.runtime import World
from shared.same_prompts import open_student_processor_of
from stage2_student.evaluation.answer_metrics import exact_match, rouge_l, token_f1
from stage2_student.evaluation.shuffled import with_other_pictures
from stage2_student.training.survey import Survey, survey_once


@dataclass(frozen=True)
class ModelSource:
    """A model's folder or Hub name, and how it is run.

    param_dtype    of its weights where its losses are computed
    compute_dtype  of its forward, and of all of it where it answers
    """

    model: str
    revision: str | None
    param_dtype: str
    compute_dtype: str
    attn_implementation: str | None

    @classmethod
    def student(cls, recipe: Recipe, folder: str) -> ModelSource:
        """A folder that holds what the recipe's student became."""
        student = recipe.student
        return cls(folder, None, student.param_dtype, student.compute_dtype, student.attn_implementation)

    @classmethod
    def untrained(cls, recipe: Recipe) -> ModelSource:
        student = recipe.student
        return cls(
            student.model,
            student.revision,
            student.param_dtype,
            student.compute_dtype,
            student.attn_implementation,
        )

    @classmethod
    def teacher(cls, recipe: Recipe) -> ModelSource:
        teacher = recipe.teacher
        assert teacher is not None
        return cls(teacher.model, teacher.revision, teacher.dtype, teacher.dtype, teacher.attn_implementation)


@dataclass(frozen=True)
class Answer:
    """The last question of a row, what the data set says, and what the model says."""

    split: str
    row: int
    kind: str
    case: str
    image_sha256: str  # of the picture's file, as ``Example.pictures_sha256``
    question: str
    reference: str
    answer: str
    is_short: bool
    is_right: bool
    is_cut: bool  # at ``max_new_tokens``, before the model ended it
    token_f1: float
    rouge_l: float


def answers_of(
    recipe: Recipe,
    source: ModelSource,
    world: World,
    *,
    split: Split,
    num_examples: int | None = None,
    found: Survey | None = None,
    shuffle_pictures: bool = False,
) -> list[Answer]:
    """What the model answers, by row; called by all ranks, which share the rows.

    num_examples  spread evenly over the split; None for all
    found         the examples that can be used, where they are known already
    shuffle_pictures  each question is about the picture of another case
    Raises        TeachonceError, or what says that memory does not suffice  on all ranks, what one of them met
    """
    processor = open_student_processor_of(recipe, source.model, revision=source.revision)
    found = (found or survey_once(recipe, split, processor, None, world)).spread(num_examples)
    if shuffle_pictures:
        found = with_other_pictures(found)
    mine = found.rows.tolist()[world.rank :: world.size]
    own: list[Answer] | Exception
    try:
        own = _answers(recipe, source, world, processor, found.split, mine, split=split, show=world.is_main)
    except Exception as error:
        if not isinstance(error, TeachonceError) and not is_out_of_memory(error):
            raise
        own = error.with_traceback(None)  # which holds the model
    world.release_memory()
    world.barrier()  # some shares take longer than others
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, own)
    for share in gathered:
        if isinstance(share, Exception):
            raise share
    return sorted((one for share in gathered for one in share), key=lambda one: one.row)


def _answers(
    recipe: Recipe,
    source: ModelSource,
    world: World,
    processor: ExampleProcessor,
    examples: VqaSplit,
    rows: list[int],
    *,
    split: Split,
    show: bool,
) -> list[Answer]:
    config = recipe.evaluation
    model = load_vlm(
        source.model,
        revision=source.revision,
        dtype=getattr(torch, source.compute_dtype),
        attn_implementation=source.attn_implementation,
        device=world.device,
    )
    ends = own_ends(model, processor)
    forget_settings(model)  # models are to be compared
    nn.Module.to(model, world.device)  # past the model's own, which refuses some quantised ones
    found = []
    begins = range(0, len(rows), config.batch_size)
    for begin in progress(begins, desc="answering", unit="batch", leave=False, disable=not show):
        some = [examples[row] for row in rows[begin : begin + config.batch_size]]
        generated = answer(model, processor, some, max_new_tokens=config.max_new_tokens, ends=ends)
        found += [
            judge(example, one, split=split, short_answer_words=config.short_answer_words)
            for example, one in zip(some, generated, strict=True)
        ]
    return found


class Generated(NamedTuple):
    text: str
    is_cut: bool


def answer(
    model: PreTrainedModel,
    processor: ExampleProcessor,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
) -> list[Generated]:
    """Greedy answers, up to the first of ``ends``, by default that of the turn, which is not part of them."""
    prompts = [processor.encode_prompt(one) for one in examples]
    answered = answering.answer(model, processor, prompts, max_new_tokens=max_new_tokens, ends=ends)
    texts = processor.tokenizer.batch_decode([one.ids for one in answered], skip_special_tokens=True)
    return [
        Generated(text.strip(), is_cut=not one.is_whole) for text, one in zip(texts, answered, strict=True)
    ]


def judge(example: Example, generated: Generated, *, split: str, short_answer_words: int) -> Answer:
    text, is_cut = generated
    return Answer(
        split=split,
        row=example.index,
        kind=example.kind,
        case=example.case,
        image_sha256=example.pictures_sha256,
        question=example.question,
        reference=example.answer,
        answer=text,
        is_short=len(example.answer.split()) <= short_answer_words,
        is_right=exact_match(text, example.answer),
        is_cut=is_cut,
        token_f1=token_f1(text, example.answer),
        rouge_l=rouge_l(text, example.answer),
    )
