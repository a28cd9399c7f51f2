"""What a student answers, how good that is, and how far it is from its teacher.

    scores = evaluate_folder(recipe, run_folder.export, world)              # at the end of a run
    rows = evaluate(recipe, models(recipe, folder), world, split="test")    # beside its references

A model is opened from its Hugging Face folder, as its users will open it, and answers greedily.  An answer is
right when it equals the reference but for case, punctuation and spaces.  Accuracy is over short references,
where there is one way to say it; exact match, token F1 and ROUGE-L are over all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from shared.config import FreezeConfig, Recipe, Split
from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError, TeachonceError
from shared.processing import ExampleProcessor, open_processor
from shared.runtime import World
from shared.vlm import load_vlm
from shared.vqa import Example, open_split
from stage2_student.answer_metrics import Interval, exact_match, mean_interval, rouge_l, token_f1
from stage2_student.feed import MicrobatchSource
from stage2_student.files import write_json
from stage2_student.inputs import open_cache
from stage2_student.order import pass_slots
from stage2_student.step import Losses
from stage2_student.student import build_student
from stage2_student.survey import survey, survey_once
from stage2_student.validate import validate

STUDENT, TEACHER, UNTRAINED = "student", "teacher", "untrained"


@dataclass(frozen=True)
class Answer:
    """A question, what the data set says, and what the model says."""

    row: int
    kind: str
    case: str
    image_sha256: str  # of the picture's file
    question: str
    reference: str
    answer: str
    is_short: bool
    is_right: bool
    token_f1: float
    rouge_l: float


@dataclass(frozen=True)
class Scores:
    """``accuracy`` is over short references; None where there are none."""

    num_examples: int
    num_short: int
    accuracy: float | None
    accuracy_by_kind: dict[str, float]
    token_f1: float | None
    rouge_l: float | None
    answers: tuple[Answer, ...]

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "answers"}


@dataclass(frozen=True)
class Evaluated:
    """One model: its answers, and its losses where they could be computed (None where not)."""

    name: str
    folder: str
    answers: tuple[Answer, ...]
    ce: float | None
    kl: float | None

    def intervals(self, kind: str | None = None) -> dict[str, Interval | None]:
        """Of one kind of question, or of all."""
        some = [one for one in self.answers if kind is None or one.kind == kind]
        short = [one for one in some if one.is_short]

        def interval(chosen: list[Answer], value: Callable[[Answer], float]) -> Interval | None:
            return mean_interval([value(one) for one in chosen], [one.image_sha256 for one in chosen])

        return {
            "accuracy": interval(short, lambda one: float(one.is_right)),
            "exact_match": interval(some, lambda one: float(one.is_right)),
            "token_f1": interval(some, lambda one: one.token_f1),
            "rouge_l": interval(some, lambda one: one.rouge_l),
        }

    @property
    def kinds(self) -> list[str]:
        return sorted({one.kind for one in self.answers if one.kind})

    def to_json(self) -> dict[str, Any]:
        def plain(kind: str | None) -> dict[str, Any]:
            return {name: found and asdict(found) for name, found in self.intervals(kind).items()}

        return {
            "model": self.name,
            "folder": self.folder,
            "num_examples": len(self.answers),
            "ce": self.ce,
            "kl": self.kl,
            **plain(None),
            "by_kind": {kind: plain(kind) for kind in self.kinds},
        }


def evaluate_folder(recipe: Recipe, folder: Path, world: World, *, rows: np.ndarray | None = None) -> Scores:
    """Each rank answers its share with a whole copy of the student; all ranks return all scores."""
    split = default_split(recipe)
    return score(answers_of(recipe, str(folder), world, split=split, rows=rows))


def default_split(recipe: Recipe) -> Split:
    return "validation" if recipe.data.splits.validation is not None else "train"


def models(recipe: Recipe, folder: Path, *, references: bool) -> dict[str, str]:
    """The model to evaluate, and what to hold it against: its teacher, and the student before training."""
    found = {STUDENT: str(folder)}
    if references and recipe.teacher is not None:
        found[TEACHER] = recipe.teacher.model
    if references and recipe.student.init == "pretrained":
        found[UNTRAINED] = recipe.student.model
    return found


def evaluate(
    recipe: Recipe,
    folders: dict[str, str],
    world: World,
    *,
    split: Split,
    num_examples: int | None = None,
) -> list[Evaluated]:
    """All models over the same rows; called by all ranks.  A reference that cannot be opened is left out, and said.

    Raises   TeachonceError  of the kind that fits, for the first model; DataError for a split the data do not have
    """
    if getattr(recipe.data.splits, split) is None:
        raise DataError(f"{recipe.data.source}: the recipe names no {split} split (data.splits.{split})")
    limited = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"max_examples": num_examples or 0})}
    )
    found = []
    for name, folder in folders.items():
        try:
            answers = answers_of(limited, folder, world, split=split)
            losses = losses_of(recipe, folder, world, split=split, num_examples=num_examples)
        except TeachonceError as error:
            if name == STUDENT:
                raise
            if world.is_main:
                click.echo(f"note: {name} is left out: {error}", err=True)
            continue
        ce, kl = losses
        found.append(Evaluated(name, folder, tuple(answers), ce, kl))
    return found


def answers_of(
    recipe: Recipe, folder: str, world: World, *, split: Split, rows: np.ndarray | None = None
) -> list[Answer]:
    """What the model of a folder answers, by row; called by all ranks, which share the rows."""
    examples = open_split(recipe.data, split)
    processor = open_processor(folder, recipe.data)
    if rows is None:
        rows = survey(recipe.data, split, processor, None).rows
    wanted = rows.tolist()[: recipe.evaluation.max_examples or None]
    model = load_vlm(
        folder,
        revision=None,
        dtype=getattr(torch, recipe.student.compute_dtype),
        attn_implementation=recipe.student.attn_implementation,
    )
    model.to(world.device)  # type: ignore[arg-type]
    config = recipe.evaluation
    own: list[Answer] = []
    mine = wanted[world.rank :: world.size]
    for begin in range(0, len(mine), config.batch_size):
        some = [examples[row] for row in mine[begin : begin + config.batch_size]]
        texts = answer(model, processor, some, max_new_tokens=config.max_new_tokens)
        own += [
            judge(example, text, short_answer_words=config.short_answer_words)
            for example, text in zip(some, texts, strict=True)
        ]
    gathered: list[list[Answer]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, own)
    return sorted((one for share in gathered for one in share), key=lambda one: one.row)


def losses_of(
    recipe: Recipe, folder: str, world: World, *, split: Split, num_examples: int | None = None
) -> tuple[float | None, float | None]:
    """CE and KL from the cache, nats a position, as validation computes them; called by all ranks.

    KL is None where there is no cache of this data, and what keeps the model from it is said.
    """
    plain = recipe.student.model_copy(
        update={
            "model": folder,
            "revision": None,
            "init": "pretrained",
            "lora": None,
            "freeze": FreezeConfig(),
            "compile": False,
        }
    )
    with_model = recipe.model_copy(update={"student": plain})
    processor = open_processor(folder, recipe.data)
    try:
        ratio = max(recipe.loss.kd_ratio, 0.5) if recipe.cache is not None else 0.0
        distilling = with_model.model_copy(
            update={"loss": recipe.loss.model_copy(update={"kd_ratio": ratio})}
        )
        losses = _validated(distilling, processor, world, split=split, num_examples=num_examples)
    except (CacheFormatError, CacheMismatchError, FileNotFoundError) as error:
        if world.is_main:
            click.echo(f"note: no KL, the cache cannot be used: {error}", err=True)
        tuning = with_model.model_copy(update={"loss": recipe.loss.model_copy(update={"kd_ratio": 0.0})})
        return _validated(tuning, processor, world, split=split, num_examples=num_examples).ce, None
    temperature = recipe.loss.temperature
    return losses.ce, losses.kd / temperature**2 if ratio else None


def _validated(
    recipe: Recipe, processor: ExampleProcessor, world: World, *, split: Split, num_examples: int | None
) -> Losses:
    cache, _ = open_cache(recipe, processor)
    found = survey_once(recipe.data, split, processor, cache, world)
    found = replace(found, rows=found.rows[:num_examples], lengths=found.lengths[:num_examples])
    slots = pass_slots(
        found.lengths,
        microbatch_size=recipe.optimization.microbatch_size,
        rank=world.rank,
        num_ranks=world.size,
    )
    source = MicrobatchSource(found.split, found.rows, processor, cache)
    student = build_student(recipe, world, num_token_ids=processor.num_token_ids)
    return validate(student, source, slots, world, num_workers=recipe.run.num_workers)


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
        case=example.case,
        image_sha256=hashlib.sha256(example.image).hexdigest(),
        question=example.question,
        reference=example.answer,
        answer=text,
        is_short=len(example.answer.split()) <= short_answer_words,
        is_right=exact_match(text, example.answer),
        token_f1=token_f1(text, example.answer),
        rouge_l=rouge_l(text, example.answer),
    )


def score(answers: Sequence[Answer]) -> Scores:
    short = [one for one in answers if one.is_short]
    kinds = sorted({one.kind for one in short if one.kind})
    return Scores(
        num_examples=len(answers),
        num_short=len(short),
        accuracy=_share_right(short) if short else None,
        accuracy_by_kind={kind: _share_right([one for one in short if one.kind == kind]) for kind in kinds},
        token_f1=float(np.mean([one.token_f1 for one in answers])) if answers else None,
        rouge_l=float(np.mean([one.rouge_l for one in answers])) if answers else None,
        answers=tuple(answers),
    )


def save(found: Sequence[Evaluated], path: Path) -> None:
    """Every prediction as Parquet, one row for each model and question; the scores as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"model": one.name, **asdict(answer)} for one in found for answer in one.answers]
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(lines), partial)
    partial.replace(path)
    write_json(path.with_suffix(".json"), [one.to_json() for one in found])


def show(found: Sequence[Evaluated]) -> None:
    """Tables for people: all questions, then each kind."""
    student = found[0]
    for one in student.answers[:3]:
        click.echo(f"  {one.question}\n    reference: {one.reference}\n    answer:    {one.answer}")
    num_short = sum(one.is_short for one in student.answers)
    click.echo(
        f"{len(student.answers)} questions, {num_short} with short answers; 95 % intervals over pictures\n"
    )
    click.echo(
        f"{'':<24}{'right, short':>20}{'exact, all':>20}{'token F1':>20}{'ROUGE-L':>20}{'CE':>9}{'KL':>9}"
    )
    for model in found:
        losses = "".join(f"{'-' if value is None else f'{value:.4f}':>9}" for value in (model.ce, model.kl))
        click.echo(f"{model.name:<24}{_cells(model.intervals())}{losses}")
        for kind in model.kinds:
            click.echo(f"  {kind:<22}{_cells(model.intervals(kind))}")


def _cells(intervals: dict[str, Interval | None]) -> str:
    shown = (
        "-" if i is None else f"{i.mean:.1%} ({100 * i.low:.1f}-{100 * i.high:.1f})"
        for i in intervals.values()
    )
    return "".join(f"{text:>20}" for text in shown)


def _share_right(answers: Sequence[Answer]) -> float:
    return sum(one.is_right for one in answers) / len(answers)


@dataclass(frozen=True)
class Subject:
    """What ``evaluate`` was asked about: a recipe, a model's folder, and where results go by default."""

    recipe: Recipe
    model: Path
    folder: Path | None

    @classmethod
    def find(
        cls, what: str, *, recipe: Callable[[str], Recipe], given: str | None, model: Path | None
    ) -> Subject:
        """``what`` is a run's folder, a model's folder (then ``given`` names the recipe), or a recipe.

        Raises   RecipeError  when it is none of these, or a model without a recipe
        """
        path = Path(what)
        if (path / "recipe.yaml").exists():
            return cls(recipe(given or str(path / "recipe.yaml")), model or path / "export", path)
        if any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            if given is None:
                raise RecipeError(f"{what}: a model's folder; say which data it is to be asked: --recipe")
            return cls(recipe(given), path, None)
        if path.is_dir():
            raise RecipeError(f"{what}: neither a run (no recipe.yaml) nor a model (no config.json)")
        loaded = recipe(what)
        return cls(loaded, model or loaded.run.path / "export", loaded.run.path)
