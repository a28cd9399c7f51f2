"""What a recipe would do and take, found out without training: ``train-student check RECIPE``.

Everything that is wrong is collected and shown at once.  Configuration, tokenizer and data are opened, no
weights; a data set that is not on this machine is not fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from transformers import PreTrainedModel

from shared.config import Recipe, Split
from shared.errors import RecipeError, TeachonceError
from shared.processing import ExampleProcessor, open_processor
from shared.vlm import split
from shared.vqa import VqaSplit, open_split
from stage2_student.estimate import MemoryEstimate, count_parameters, estimate_memory
from stage2_student.freezing import find_parts, freeze
from stage2_student.inputs import open_cache
from stage2_student.student import check_vocabulary, meta_model
from stage2_student.train import require_even_ranks, step_shape, total_steps

TOKENS_WITHOUT_DATA = 1024
NUM_MEASURED = 32


@dataclass
class Report:
    """Facts in the order in which they were found, and problems."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    memory: MemoryEstimate | None = None

    def add(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a problem and goes on."""
        try:
            yield
        except TeachonceError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def check_recipe(recipe: Recipe, *, num_ranks: int) -> Report:
    """Looks at everything that a run of ``num_ranks`` processes would need."""
    report = Report()
    report.add("run", f"{recipe.run.path}" + (" (exists)" if recipe.run.path.exists() else ""))
    model = processor = None
    with report.collecting():
        model = meta_model(recipe.student)
        _describe_model(report, recipe, model)
    with report.collecting():
        processor = _open_processor(report, recipe)
    if model is not None and processor is not None:
        with report.collecting():
            check_vocabulary(model, processor.num_token_ids)
    tokens = _describe_data(report, recipe, processor)
    if processor is not None:
        with report.collecting():
            _describe_cache(report, recipe, processor)
    with report.collecting():
        _describe_steps(report, recipe, num_ranks)
    if model is not None:
        report.memory = estimate_memory(model, recipe, num_ranks=num_ranks, tokens_per_example=tokens)
    return report


def print_report(report: Report) -> int:
    """Prints it; returns the exit status."""
    for name, value in report.facts:
        click.echo(f"{name:<18} {value}")
    if report.memory is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in vars(report.memory).items())
        click.echo(f"{'memory per device':<18} about {report.memory.total:.2f} GiB ({parts})")
    for problem in report.problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo(f"{len(report.problems)} problem(s)" if report.problems else "no problem found")
    return RecipeError.exit_status if report.problems else 0


def _describe_model(report: Report, recipe: Recipe, model: PreTrainedModel) -> None:
    report.add("student", f"{recipe.student.model} ({type(model).__name__})")
    freeze(model, recipe.student.freeze)
    total, trained = count_parameters(model), count_parameters(model, trained_only=True)
    report.add("parameters", f"{total:,}: {trained:,} trained, {total - trained:,} frozen")
    for name, modules in find_parts(model).items():
        if modules:
            parameters = {id(p): p for module in modules for p in module.parameters()}.values()
            total = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            report.add(f"  {name}", f"{total:,}: {trained:,} trained")
    text = model.config.get_text_config()
    report.add("text model", f"{text.num_hidden_layers} layers, hidden {text.hidden_size}")
    report.add("head", f"{split(model)[1].weight_VD.shape[0]:,} ids wide")


def _open_processor(report: Report, recipe: Recipe) -> ExampleProcessor | None:
    folder = Path(recipe.student.model)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        report.add("tokenizer", f"none in {folder}: not looked at")
        return None
    processor = open_processor(recipe.student.model, recipe.data, revision=recipe.student.revision)
    report.add("tokenizer", f"{processor.num_token_ids:,} ids, {processor.tokenizer_fingerprint[:12]}")
    return processor


def _describe_data(report: Report, recipe: Recipe, processor: ExampleProcessor | None) -> int:
    """Returns the tokens of a long example, for the estimate."""
    if not Path(recipe.data.source).exists():
        report.add("data", f"{recipe.data.source} is not on this machine: not looked at")
        return TOKENS_WITHOUT_DATA
    tokens = TOKENS_WITHOUT_DATA
    wanted: list[Split] = ["train", "validation"] if recipe.data.splits.validation else ["train"]
    for name in wanted:
        with report.collecting():
            opened = open_split(recipe.data, name)
            report.add(name, f"{len(opened):,} examples" + _positions(opened, recipe, processor))
            if processor is not None and name == "train":
                tokens = _long_example(opened, processor)
                report.add("  example", f"{tokens:,} tokens, the longest of the first {NUM_MEASURED}")
    return tokens


def _positions(opened: VqaSplit, recipe: Recipe, processor: ExampleProcessor | None) -> str:
    """Answer tokens and the end of the turn, counted without looking at a picture."""
    if processor is None:
        return ""
    answers = [example.answer for example in opened]
    limit = recipe.data.max_answer_tokens
    ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    counts = np.array([min(len(one) + 1, limit) for one in ids])
    cut = sum(len(one) > limit for one in ids)
    return f", {counts.sum():,} answer positions, {counts.mean():.1f} on average, {cut} answers cut"


def _long_example(opened: VqaSplit, processor: ExampleProcessor) -> int:
    return max(len(processor.encode(opened[row]).input_ids) for row in range(min(NUM_MEASURED, len(opened))))


def _describe_cache(report: Report, recipe: Recipe, processor: ExampleProcessor) -> None:
    if not recipe.distils:
        report.add("cache", "none needed: kd_ratio is 0")
        return
    assert recipe.cache is not None
    if not Path(recipe.cache.path).exists() and "://" not in recipe.cache.path:
        report.add("cache", f"{recipe.cache.path} is not there yet: teacher-cache makes it")
        return
    cache, notices = open_cache(recipe, processor)
    assert cache is not None
    totals = cache.manifest.totals
    report.add(
        "cache",
        f"{recipe.cache.path}: {totals.examples:,} examples, {totals.positions:,} positions, "
        f"{totals.bytes / max(1, totals.positions):.1f} bytes a position",
    )
    for notice in notices:
        report.add("  note", notice)


def _describe_steps(report: Report, recipe: Recipe, num_ranks: int) -> None:
    config = recipe.optimization
    rounds = require_even_ranks(recipe, num_ranks)
    report.add(
        "step",
        f"{config.global_batch_size} examples: {rounds} round(s) of {config.microbatch_size} on {num_ranks} rank(s)",
    )
    if num_ranks % recipe.parallel.dp_replicate:
        raise RecipeError(
            f"parallel.dp_replicate {recipe.parallel.dp_replicate} does not divide {num_ranks} ranks"
        )
    if Path(recipe.data.source).exists():
        shape = step_shape(recipe, len(open_split(recipe.data, "train")))
        report.add("steps", f"{total_steps(recipe, shape):,}, {shape.num_steps_per_epoch:,} an epoch")
    elif config.max_steps is not None:
        report.add("steps", f"{config.max_steps:,}")
