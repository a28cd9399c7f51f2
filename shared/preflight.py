"""What both stages' ``check`` have in common: facts and problems, collected and shown at once.

Configurations, tokenizers, weight files and data are looked at, nothing is loaded; what is not on this machine is
not fetched.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedModel

from shared.cache import Cache, CacheMix, CacheReader
from shared.cache.index import as_key_array
from shared.completeness import broken_shards
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, DataError, RecipeError, TeachonceError, listed, shortened
from shared.models.quantized import require_library, what_becomes_of_it
from shared.models.vlm import num_logit_ids, scale_left_out, split
from shared.models.weight_files import require_whole_weights, weight_files
from shared.places import is_local, require_no_typo
from shared.recipes import DataConfig, Recipe, Split, trainer_of
from shared.same_prompts import open_processor_of
from shared.same_teacher import require_teacher
from shared.split_check import SplitFound, look_at

TOKENS_WITHOUT_DATA = 1024
# Names of columns that hold the answers to choose from, or one each: choices, choice_a, Option 1.
CHOICES = re.compile(r"(.*[ _-])?(choices?|options?|candidates)([ _-]?([a-d]|\d))?")
LETTERS = {"a", "b", "c"}  # such columns of one letter
MAX_TOKENS = 5  # named in a note


@dataclass
class Report:
    """Facts in the order in which they were found, and problems, each once."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    errors: list[TeachonceError] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    def note(self, text: str) -> None:
        """A fact that asks for attention and stops nothing."""
        self.add("  note", text)

    def refuse(self, error: TeachonceError) -> None:
        if str(error) not in self.problems:
            self.errors.append(error)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a problem and goes on."""
        try:
            yield
        except TeachonceError as error:
            self.refuse(error)

    @property
    def problems(self) -> list[str]:
        return [str(error) for error in self.errors]

    @property
    def status(self) -> int:
        """That of the problem; of several, recipe before data before cache before mismatch."""
        return min((error.exit_status for error in self.errors), default=0)

    def show(self) -> int:
        """Prints everything; returns the exit status."""
        for name, value in self.facts:
            click.echo(f"{name:<18} {value}")
        for problem in self.problems:
            click.echo(f"problem: {problem}", err=True)
        click.echo(f"{len(self.errors)} problem(s)" if self.errors else "no problem found")
        return self.status


def is_made_later(recipe: Recipe, name: str) -> bool:
    """Whether a model is missing that the recipe makes for itself, or trains, when it is first run."""
    small = recipe.bootstrap.small_models
    made = {model.path for model in small.models} if small else set()
    if recipe.teacher is not None and recipe.teacher.trained_by is not None:
        made.add(recipe.teacher.model)
    return name in made and not is_local(name)


def require_training_recipe(recipe: Recipe) -> None:
    """Raises   RecipeError  when the recipe that is to train the teacher cannot be read, or makes another folder"""
    trainer = trainer_of(recipe)
    if trainer is None:
        return
    assert recipe.teacher is not None
    export = trainer.run.path / "export"
    if export != Path(recipe.teacher.model):
        raise RecipeError(
            f"teacher.trained_by {recipe.teacher.trained_by}: its export is {export}, teacher.model is "
            f"{recipe.teacher.model}. They must be the same folder"
        )


def describe_shape(report: Report, model: PreTrainedModel) -> None:
    """Layers and the head's width."""
    text = model.config.get_text_config()
    report.add("  text model", f"{text.num_hidden_layers} layers, hidden {text.hidden_size}")
    report.add("  head", f"{split(model)[1].weight_VD.shape[0]:,} ids wide")
    if (left_out := scale_left_out(model.config)) is not None:
        report.note(left_out)


def require_head(
    report: Report, model: PreTrainedModel | None, processor: ExampleProcessor | None, *, what: str
) -> None:
    """Notes a head that is narrower than the tokenizer, where both are there."""
    if model is not None and processor is not None:
        with report.collecting():
            num_logit_ids(model, processor.num_token_ids, num_answer_ids=processor.num_answer_ids, what=what)


def describe_tokenizer(
    report: Report, recipe: Recipe, name: str, *, revision: str | None
) -> ExampleProcessor | None:
    """Opens the processor where the model's folder has a tokenizer."""
    folder = Path(name)
    if would_be_fetched(name, revision):
        report.add("  tokenizer", f"{name} is not on this machine: not looked at")
        return None
    files = weight_files(name, revision)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not (files and files.files):
        report.add("  tokenizer", f"none in {folder}: not looked at")
        return None
    processor = open_processor_of(recipe, name, revision=revision)
    report.add("  tokenizer", f"{processor.num_token_ids:,} ids, {processor.tokenizer_fingerprint[:12]}")
    if processor.date is not None:
        report.add("  date", f"{processor.date}, which the chat template prints (data.date)")
    return processor


def would_be_fetched(name: str, revision: str | None) -> bool:
    """Whether a model is the Hub's and no part of it is on this machine."""
    try:
        return not is_local(name) and try_to_load_from_cache(name, "config.json", revision=revision) is None
    except ValueError:  # a path, and none of this machine: opening it says so
        return False


def require_model(report: Report, name: str, revision: str | None, *, weights: bool = True) -> None:
    """Notes a mistyped folder, and weight files that are missing, cut or never fetched."""
    with report.collecting():
        require_no_typo(name, what=f"model {name}", error=RecipeError)
        if weights:
            require_whole_weights(name, revision)


def describe_quantization(report: Report, name: str, config: PretrainedConfig, *, dequantize: bool) -> None:
    """Says what becomes of quantised weights, and notes a package that is missing for them."""
    if (told := what_becomes_of_it(config, dequantize=dequantize)) is not None:
        report.note(f"{name}: {told}")
    with report.collecting():
        require_library(name, config)


def require_writable(path: Path, *, what: str) -> None:
    """Raises   RecipeError  when nothing can be written at ``path``, which need not be there"""
    there = path.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(None, "not a folder" if there.exists() else "a link to nothing")
        with tempfile.TemporaryFile(dir=there):
            pass
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(None, "permission denied")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError(f"{what} {path}: nothing can be written there: {there}: {reason}") from error


def describe_data(
    report: Report, recipe: Recipe, names: Sequence[Split], processor: ExampleProcessor | None
) -> list[SplitFound]:
    """Looks at every row of the splits that can be opened; facts and notes go into the report."""
    source = recipe.data.source
    if not is_local(source):
        if recipe.bootstrap.phantom is not None:
            report.add("data", f"{source} is not there yet: it is drawn when the recipe is first run")
            return []
        with report.collecting():
            require_no_typo(source, what=f"data.source {source}", error=DataError)
            report.add("data", f"{source} is not on this machine: not looked at")
        return []
    looked = []
    for name in names:
        with report.collecting():
            found = look_at(recipe.data, name, processor)
            _describe_split(report, name, found)
            looked.append(found)
    if shared := _num_in_several([found.keys for found in looked]):
        report.note(f"{shared} row(s) of one split are also in another")
    if looked and processor is not None:
        longest = max(found.longest for found in looked)
        report.add("  longest example", f"{longest:,} tokens, picture and answer among them")
    return looked


def describe_unusable(
    report: Report, found: Sequence[SplitFound], data: DataConfig, *, what: str, also: Sequence[str] = ()
) -> None:
    """Rows that are left out: a problem when they are more than allowed, or all of a split.

    also  reasons of rows that are readable
    """
    reasons = [*(reason for one in found for reason in one.reasons), *also]
    if len(reasons) > data.max_dropped:
        report.refuse(
            DataError(
                f"{what}: {len(reasons)} row(s) cannot be used, data.max_dropped allows {data.max_dropped}:\n"
                f"{listed(reasons)}"
            )
        )
    elif reasons:
        report.note(f"{len(reasons)} row(s) of {what} are left out:\n{listed(reasons)}")
    for one in found:
        if not one.num_usable:
            report.refuse(DataError(f"{one.split.source}, split {one.split.name}: no row can be used"))


def describe_caches(report: Report, recipe: Recipe, cache: Cache) -> None:
    """Size and shards of each, and whether the recipe's teacher is among theirs."""
    shares = cache.weights if isinstance(cache, CacheMix) else [None] * len(cache.parts)
    for part, share in zip(cache.parts, shares, strict=True):
        _describe_cache(report, part, share)
    if len(cache.teacher_names) > 1 or isinstance(cache, CacheMix):
        report.add("teachers", ", ".join(cache.teacher_names))
    with report.collecting():
        for notice in require_teacher(cache, recipe.teacher):
            report.note(notice)


def _describe_cache(report: Report, cache: CacheReader, share: float | None) -> None:
    totals = cache.manifest.totals
    report.add(
        "cache",
        f"{cache.location}: {totals.examples:,} examples, {totals.positions:,} positions, "
        f"{totals.bytes / max(totals.positions, 1):.1f} bytes a position"
        + ("" if share is None else f"; {share:.3g} of the targets"),
    )
    with report.collecting():
        if broken := broken_shards(cache, hashed=False):
            raise CacheFormatError(
                f"cache {cache.location}: {len(broken)} of {len(cache.manifest.shards)} shard(s) are gone or have "
                f"not the size in the manifest, {broken[0]} first. Run teacher-cache: only their examples are "
                "recomputed"
            )


def _describe_split(report: Report, name: str, found: SplitFound) -> None:
    counts = found.positions
    told = ""
    if len(counts):
        told = f", {counts.sum():,} answer positions, {counts.mean():.1f} on average, {found.num_cut} answers cut"
    report.add(name, f"{len(found.split):,} examples{told}")
    report.add("  form", _form(found))
    if found.split.unused:
        report.add("  not used", f"columns {shortened(', '.join(found.split.unused))}")
    if found.num_bare * 2 > found.num_usable and _are_choices(found.split.unused):
        report.note(
            f"{found.num_bare:,} answers of {name} are a number or a letter, and the choices are in columns that are "
            "not used. Write the choices into the question, and the chosen text into the answer"
        )
    if found.num_listed:
        report.note(
            f"{found.num_listed:,} answers of {name} are texts that read as lists, such as \"['a', 'b']\", and are "
            "learned with brackets and quotes. Write one text, or a list for data.answers majority"
        )
    if found.beside:
        columns = " and ".join(found.beside)
        report.note(
            f"rows of {name} seem to have pictures in {shortened(columns)} too, which no prompt shows. All pictures "
            "of a row belong in one column, as a list"
        )
    if found.spelled:
        tokens = ", ".join(f"{token!r} {number:,}" for token, number in found.spelled.most_common(MAX_TOKENS))
        report.note(
            f"answers of {name} say added tokens of the model, which are learned as pieces of text (rows of each: "
            f"{shortened(tokens)}). A model that writes them as tokens is learned from answer_ids"
        )
    if found.num_written:
        report.add("  written", f"{found.num_written:,} answers, by a model")
    if found.num_outvoted:
        report.note(f"{found.num_outvoted:,} answer(s) of {name} are dropped: not what most of their row say")
    if found.num_with_ids:
        report.add("  token ids", f"of {found.num_with_ids:,} answers, as their writer has them")
    if found.num_unended:
        report.add("  not ended", f"{found.num_unended:,} answers: no end of the turn is learned")
    report.add("  pictures", f"all headers read, {found.num_decoded:,} of {len(found.split):,} decoded")
    if found.num_duplicates:
        report.note(f"{found.num_duplicates} row(s) of {name} are equal to an earlier one")
    if found.doubtful:
        report.note(
            f"{len(found.doubtful)} picture(s) of {name} show next to nothing:\n{listed(found.doubtful)}"
        )


def _are_choices(columns: Sequence[str]) -> bool:
    names = {name.lower() for name in columns}
    return names >= LETTERS or any(CHOICES.fullmatch(name) for name in names)


def _form(found: SplitFound) -> str:
    """Such as ``messages; 2 to 5 answers a row; 3 rows without pictures, 4 with several``."""
    forms = [name if len(found.forms) == 1 else f"{name} {number:,}" for name, number in found.forms.items()]
    told = [", ".join(forms) or "none: no row can be used"]
    if max(found.num_turns, default=1) > 1:
        told.append(f"{min(found.num_turns)} to {max(found.num_turns)} answers a row")
    without = found.num_pictures[0]
    several = sum(rows for number, rows in found.num_pictures.items() if number > 1)
    for rows, what in ((without, "without pictures"), (several, "with several")):
        if rows:
            told.append(f"{rows:,} row(s) {what}")
    return "; ".join(told)


def _num_in_several(splits: Sequence[np.ndarray]) -> int:
    """Distinct rows that more than one split holds, of each split's keys."""
    if not splits:
        return 0
    counts = np.unique(
        np.concatenate([np.unique(as_key_array(keys)) for keys in splits]), return_counts=True
    )[1]
    return int((counts > 1).sum())
