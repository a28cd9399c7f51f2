"""Answers of a trained student, and how many short ones are right.

    scores = evaluate_folder(recipe, run_folder.export, world)

The student is opened from its Hugging Face folder, as its users will open it, and answers greedily.  An
answer is right when it equals the reference but for case, punctuation and spaces; that is asked of short
references only, where there is one way to say it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from shared.config import Recipe, Split
from shared.processing import ExampleProcessor, open_processor
from shared.runtime import World
from shared.vlm import load_vlm
from shared.vqa import Example, open_split
from stage2_student.survey import survey


@dataclass(frozen=True)
class Answer:
    """A question, what the data set says, and what the student says."""

    row: int
    kind: str
    question: str
    reference: str
    answer: str
    is_short: bool
    is_right: bool


@dataclass(frozen=True)
class Scores:
    """``accuracy`` is over short references; None where there are none."""

    num_examples: int
    num_short: int
    accuracy: float | None
    accuracy_by_kind: dict[str, float]
    answers: tuple[Answer, ...]

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def evaluate_folder(recipe: Recipe, folder: Path, world: World, *, rows: np.ndarray | None = None) -> Scores:
    """Each rank answers its share with a whole copy of the student; all ranks return all scores."""
    split_name: Split = "validation" if recipe.data.splits.validation is not None else "train"
    split = open_split(recipe.data, split_name)
    processor = open_processor(str(folder), recipe.data)
    if rows is None:
        rows = survey(recipe.data, split_name, processor, None).rows
    wanted = rows.tolist()[: recipe.evaluation.max_examples or None]
    model = load_vlm(
        str(folder),
        revision=None,
        dtype=getattr(torch, recipe.student.compute_dtype),
        attn_implementation=recipe.student.attn_implementation,
    )
    model.to(world.device)  # type: ignore[arg-type]
    config = recipe.evaluation
    own: list[Answer] = []
    mine = wanted[world.rank :: world.size]
    for begin in range(0, len(mine), config.batch_size):
        examples = [split[row] for row in mine[begin : begin + config.batch_size]]
        texts = answer(model, processor, examples, max_new_tokens=config.max_new_tokens)
        own += [
            judge(example, text, short_answer_words=config.short_answer_words)
            for example, text in zip(examples, texts, strict=True)
        ]
    gathered: list[list[Answer]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, own)
    return score(sorted((one for share in gathered for one in share), key=lambda one: one.row))


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ExampleProcessor, examples: Sequence[Example], *, max_new_tokens: int
) -> list[str]:
    """Greedy answers, up to the end of the turn, which is not part of them."""
    batch = processor.collate([processor.encode_prompt(one) for one in examples], padding_side="left")
    batch = batch.to(model.device)
    ids = model.generate(  # type: ignore[operator]
        **batch.inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=processor.end_of_turn,
        pad_token_id=processor.end_of_turn,
    )
    new = ids[:, batch.inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def judge(example: Example, text: str, *, short_answer_words: int) -> Answer:
    return Answer(
        row=example.index,
        kind=example.kind,
        question=example.question,
        reference=example.answer,
        answer=text,
        is_short=len(example.answer.split()) <= short_answer_words,
        is_right=normalize(text) == normalize(example.answer),
    )


def score(answers: Sequence[Answer]) -> Scores:
    short = [one for one in answers if one.is_short]
    kinds = sorted({one.kind for one in short if one.kind})
    return Scores(
        num_examples=len(answers),
        num_short=len(short),
        accuracy=_share_right(short) if short else None,
        accuracy_by_kind={kind: _share_right([one for one in short if one.kind == kind]) for kind in kinds},
        answers=tuple(answers),
    )


def normalize(text: str) -> str:
    """Lower case, letters and digits of any script, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def print_scores(scores: Scores) -> None:
    for one in scores.answers[:5]:
        click.echo(f"  {one.question}\n    reference: {one.reference}\n    answer:    {one.answer}")
    right = "no short references" if scores.accuracy is None else f"{scores.accuracy:.1%}"
    click.echo(
        f"short answers right: {right} ({scores.num_short} of {scores.num_examples} references are short)"
    )
    for kind, accuracy in scores.accuracy_by_kind.items():
        click.echo(f"  {kind}: {accuracy:.1%}")


def _share_right(answers: Sequence[Answer]) -> float:
    return sum(one.is_right for one in answers) / len(answers)
