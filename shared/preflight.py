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
from transformers import PreTrainedModel

from shared.cache import CacheReader
from shared.config import DataConfig, Split
from shared.errors import RecipeError, TeachonceError
from shared.processing import ExampleProcessor, open_processor
from shared.vlm import split
from shared.vqa import VqaSplit, open_split

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
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        report.add("  tokenizer", f"none in {folder}: not looked at")
        return None
    processor = open_processor(name, data, revision=revision)
    report.add("  tokenizer", f"{processor.num_token_ids:,} ids, {processor.tokenizer_fingerprint[:12]}")
    return processor


def describe_split(report: Report, data: DataConfig, name: Split, processor: ExampleProcessor | None) -> int:
    """Examples and answer positions of a split; returns the positions, 0 where they cannot be counted."""
    opened = open_split(data, name)
    counts, num_cut = answer_positions(opened, data, processor)
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


def answer_positions(
    opened: VqaSplit, data: DataConfig, processor: ExampleProcessor | None
) -> tuple[np.ndarray, int]:
    """Answer tokens and the end of the turn of each example, (n,) int64, and how many are cut.

    Counted without looking at a picture; empty without a processor.
    """
    if processor is None:
        return np.zeros(0, np.int64), 0
    answers = [example.answer for example in opened]
    ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    limit = data.max_answer_tokens
    lengths = np.array([len(one) for one in ids], np.int64)
    return np.where(lengths > limit, limit, lengths + 1), int((lengths > limit).sum())


def describe_long_example(report: Report, data: DataConfig, processor: ExampleProcessor | None) -> int:
    """Tokens of the longest of the first training examples, its picture's among them."""
    if processor is None or not is_local(data.source):
        return TOKENS_WITHOUT_DATA
    opened = open_split(data, "train")
    tokens = max(
        len(processor.encode(opened[row]).input_ids) for row in range(min(NUM_MEASURED, len(opened)))
    )
    report.add("  example", f"{tokens:,} tokens, the longest of the first {NUM_MEASURED}")
    return tokens
