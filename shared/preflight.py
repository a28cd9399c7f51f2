"""What both stages' ``check`` have in common: facts and problems, collected and shown at once.

Configurations, tokenizers and data are opened, no weights; what is not on this machine is not fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from shared.cache import CacheReader
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError, RecipeError, TeachonceError
from shared.models.vlm import split
from shared.recipes import DataConfig, Recipe, Split

NUM_MEASURED = 32  # examples whose tokens are counted, pictures and all
TOKENS_WITHOUT_DATA = 1024


@dataclass
class Report:
    """Facts in the order in which they were found, and problems."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a problem and goes on."""
        try:
            yield
        except TeachonceError as error:
            self.problems.append(str(error))

    def show(self) -> int:
        """Prints everything; returns the exit status."""
        for name, value in self.facts:
            click.echo(f"{name:<18} {value}")
        for problem in self.problems:
            click.echo(f"problem: {problem}", err=True)
        click.echo(f"{len(self.problems)} problem(s)" if self.problems else "no problem found")
        return RecipeError.exit_status if self.problems else 0


def is_local(name: str) -> bool:
    """Whether a model or data set lies in this machine's files."""
    return Path(name).exists()


def _would_be_fetched(name: str, revision: str | None) -> bool:
    """Whether a model is the Hub's and no part of it is on this machine."""
    try:
        return not is_local(name) and try_to_load_from_cache(name, "config.json", revision=revision) is None
    except ValueError:  # a path, and none of this machine: opening it says so
        return False


def is_made_later(recipe: Recipe, name: str) -> bool:
    """Whether a model is missing that the recipe makes for itself, or trains, when it is first run."""
    small = recipe.bootstrap.small_models
    made = {model.path for model in small.models} if small else set()
    if recipe.teacher is not None and recipe.teacher.trained_by is not None:
        made.add(recipe.teacher.model)
    return name in made and not is_local(name)


def describe_shape(report: Report, model: PreTrainedModel) -> None:
    """Layers and the head's width."""
    text = model.config.get_text_config()
    report.add("  text model", f"{text.num_hidden_layers} layers, hidden {text.hidden_size}")
    report.add("  head", f"{split(model)[1].weight_VD.shape[0]:,} ids wide")


def describe_tokenizer(
    report: Report, name: str, data: DataConfig, *, revision: str | None
) -> ExampleProcessor | None:
    """Opens the processor where the model's folder has a tokenizer."""
    folder = Path(name)
    if _would_be_fetched(name, revision):
        report.add("  tokenizer", f"{name} is not on this machine: not looked at")
        return None
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        report.add("  tokenizer", f"none in {folder}: not looked at")
        return None
    processor = open_processor(name, data, revision=revision)
    report.add("  tokenizer", f"{processor.num_token_ids:,} ids, {processor.tokenizer_fingerprint[:12]}")
    return processor


def describe_split(report: Report, data: DataConfig, name: Split, processor: ExampleProcessor | None) -> int:
    """Examples and answer positions of a split; returns the positions, 0 where they cannot be counted.

    Raises   DataError  when more rows than allowed cannot be used, or all of them
    """
    opened = open_split(data, name)
    counts, num_cut = answer_positions(opened, data, processor)
    if processor is not None and not len(counts):
        raise DataError(f"{opened.source}, split {opened.name}: no row can be used")
    told = ""
    if len(counts):
        told = f", {counts.sum():,} answer positions, {counts.mean():.1f} on average, {num_cut} answers cut"
    report.add(name, f"{len(opened):,} examples{told}")
    return int(counts.sum())


def describe_cache_totals(report: Report, cache: CacheReader) -> None:
    totals = cache.manifest.totals
    report.add(
        "cache",
        f"{cache.location}: {totals.examples:,} examples, {totals.positions:,} positions, "
        f"{totals.bytes / max(totals.positions, 1):.1f} bytes a position",
    )


def readable(opened: VqaSplit, data: DataConfig) -> list[Example]:
    """The examples that can be read.

    Raises   DataError  with every row that cannot, when they are more than ``data.max_dropped``
    """
    examples, reasons = [], []
    for row in range(len(opened)):
        try:
            examples.append(opened[row])
        except DataError as error:
            reasons.append(str(error))
    if len(reasons) > data.max_dropped:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise DataError(
            f"{opened.source}, split {opened.name}: {len(reasons)} row(s) cannot be used, data.max_dropped "
            f"allows {data.max_dropped}:\n{listed}"
        )
    return examples


def answer_positions(
    opened: VqaSplit, data: DataConfig, processor: ExampleProcessor | None
) -> tuple[np.ndarray, int]:
    """Answer tokens and the end of the turn of each example, (n,) int64, and how many are cut.

    Counted without looking at a picture; empty without a processor.
    """
    if processor is None:
        return np.zeros(0, np.int64), 0
    answers = [example.answer for example in readable(opened, data)]
    if not answers:  # all rows may be dropped; a tokenizer trips over an empty list
        return np.zeros(0, np.int64), 0
    ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    limit = data.max_answer_tokens
    lengths = np.array([len(one) for one in ids], np.int64)
    return np.where(lengths > limit, limit, lengths + 1), int((lengths > limit).sum())


def describe_long_example(report: Report, data: DataConfig, processor: ExampleProcessor | None) -> int:
    """Tokens of the longest of the first training examples, its picture's among them."""
    if processor is None or not is_local(data.source):
        return TOKENS_WITHOUT_DATA
    opened = open_split(data, "train")
    lengths = []
    for row in range(min(NUM_MEASURED, len(opened))):
        try:
            lengths.append(len(processor.encode(opened[row]).input_ids))
        except DataError as error:
            if not data.max_dropped:
                report.problems.append(str(error))
    tokens = max(lengths, default=TOKENS_WITHOUT_DATA)
    report.add("  example", f"{tokens:,} tokens, the longest of the first {NUM_MEASURED}")
    return tokens
