"""Is the cache faithful?  The teacher runs again over sampled rows, and what it says is compared with what is kept.

    found = audit(recipe, reader, world)
    show(found)

Beside each figure stands its *noise floor*: the same figure for the same teacher run a second time with each
example in a batch of its own.  A cache cannot be closer to its teacher than the teacher is to itself.  Where the
first pass had no larger batches there is no floor: both passes would be the same one.

Legend: N positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from torch import Tensor

from shared.batching import BatchRunner
from shared.cache import CacheReader
from shared.capture.planning import NumberedRows, open_rows
from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.errors import CacheMismatchError, DataError, RecipeError
from shared.progress import by_examples, progress
from shared.recipes import Recipe
from shared.runtime import World
from shared.same_prompts import inputs_identity, open_processor_of
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage1_teacher.inspection.comparison import AtTemperature, Comparison
from stage1_teacher.inspection.head_gradient import BATCHES, Measured

TRIES = 4  # rows looked at for each that is wanted: some may have been left out of the cache
# Where no number of examples is asked for: as many as the largest batch needs, but not so many that all their
# pictures, which are held at once, take much memory.
MIN_EXAMPLES, MAX_EXAMPLES = 64, 256
ENOUGH_POSITIONS = max(BATCHES)


@dataclass(frozen=True)
class Audit:
    """What was compared, and what came out.

    tail  where the loss puts the mass that ``top_k`` and ``top_p`` leave out; None for draws, which leave out none
    """

    cache: str
    teacher: str
    tail: str | None
    num_examples: int
    num_positions: int
    num_not_cached: int  # rows that were looked at and are not in the cache
    num_unreadable: int
    results: tuple[AtTemperature, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def exceeds(self, max_error: float, *, num_positions: int) -> list[str]:
        """Every temperature at which the gradient's error over so many positions is above the bound, as a message.

        A NaN is above.  The audit was made with at least ``num_positions``.
        """
        found = []
        for result in self.results:
            error = result.gradient_error[num_positions].cache
            assert error is not None
            if not error <= max_error:
                found.append(
                    f"cache {self.cache}: at temperature {result.temperature:g} the head's gradient over "
                    f"{num_positions:,} positions is off by {error:.4f}, more than {max_error:g}"
                )
        return found


def audit(
    recipe: Recipe,
    reader: CacheReader,
    world: World,
    *,
    num_examples: int | None = None,
    min_positions: int = 0,
    seed: int = 0,
) -> Audit:
    """Runs the teacher over rows of the recipe's data that the cache holds.

    With several ranks all of them do the same, as a teacher that is sharded over them needs.

    num_examples   None: as many as ``ENOUGH_POSITIONS`` need, from ``MIN_EXAMPLES`` to ``MAX_EXAMPLES``
    min_positions  without which there is nothing to hold against a bound

    Raises   CacheMismatchError  when the recipe's teacher, tokenizer or template is not the cache's
             DataError           when no row that was looked at is in the cache, or there are too few positions
    """
    if recipe.teacher is None or recipe.cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: an audit needs a teacher and a cache section")
    processor = open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
    require_inputs(reader, recipe, processor)
    sample = choose(reader, open_rows(recipe), processor, num_examples=num_examples, seed=seed)
    encoded = sample.encoded
    if sample.num_positions < min_positions:
        raise DataError(
            f"cache {reader.location}: {len(encoded)} examples with {sample.num_positions:,} positions found, a "
            f"bound on the head's gradient over {min_positions:,} positions needs as many. Take more (--examples), "
            "or bound the error over fewer (--max-error-positions)"
        )
    teacher = load_teacher(
        recipe.teacher,
        num_token_ids=processor.num_token_ids,
        num_answer_ids=processor.num_answer_ids,
        world=world,
    )
    if world.is_main:
        require_teacher(reader, teacher, recipe.teacher.dtype)
    together, largest = hidden_states(encoded, processor, teacher, max_tokens=recipe.cache.batch_tokens)
    alone = hidden_states(encoded, processor, teacher, max_tokens=1)[0] if largest > 1 else None
    rows = reader.rows([one.key for one in encoded])
    for one, row in zip(encoded, rows, strict=True):
        if one.answer_ids.tolist() != row.answer_ids.tolist():
            raise CacheMismatchError(
                f"cache {reader.location}: row {one.key.hex()} holds other answer tokens than the data. The "
                "tokenizers or templates differ"
            )
    targets, tail = reader.targets(rows), recipe.loss.tail_mode
    comparison = Comparison.of(teacher, encoded, targets, together, alone, tail=tail, seed=seed)
    return Audit(
        cache=reader.location,
        teacher=recipe.teacher.model,
        tail=None if targets.policy.is_sampled else tail,
        num_examples=len(encoded),
        num_positions=len(comparison.labels_N),
        num_not_cached=sample.num_not_cached,
        num_unreadable=sample.num_unreadable,
        results=tuple(comparison.at(temperature) for temperature in reader.temperatures),
    )


def require_inputs(reader: CacheReader, recipe: Recipe, processor: ExampleProcessor) -> None:
    """Raises   CacheMismatchError  with both sides of all that differs"""
    stored = reader.manifest.identity
    own = inputs_identity(processor, recipe.data)
    ours = stored.model_copy(update={"inputs": own})
    stored.compare_capture(ours).require(
        where=f"cache {reader.location}",
        remedy="Audit it with the recipe that it was captured with (--recipe)",
    )


def require_teacher(reader: CacheReader, teacher: Teacher, dtype: str) -> None:
    """Raises   CacheMismatchError  when these are other weights, or weights of another type"""
    stored = reader.manifest.identity.teacher
    if (stored.weights_fingerprint, stored.dtype) != (teacher.weights_fingerprint, dtype):
        raise CacheMismatchError(
            f"cache {reader.location}: its teacher {stored.name} has weights {stored.weights_fingerprint[:12]} in "
            f"{stored.dtype}, this one {str(teacher.weights_fingerprint)[:12]} in {dtype}. Audit it with the "
            "teacher that made it"
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples that the cache holds, and how many rows that were looked at are not among them."""

    encoded: list[Encoded]
    num_not_cached: int
    num_unreadable: int

    @property
    def num_positions(self) -> int:
        return sum(one.num_positions for one in self.encoded)


def choose(
    reader: CacheReader,
    rows: NumberedRows,
    processor: ExampleProcessor,
    *,
    num_examples: int | None,
    seed: int,
) -> Sample:
    """Examples in random order, equal ones once.

    Raises   DataError  when there are none
    """
    fewest, most = (MIN_EXAMPLES, MAX_EXAMPLES) if num_examples is None else (num_examples, num_examples)
    total = sum(len(split) for split in rows.splits)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(total, generator=generator)[: TRIES * most].tolist()
    found: dict[bytes, Encoded] = {}
    num_positions = num_not_cached = num_unreadable = 0
    with progress(total=min(most, total), desc="reading the sample", unit="ex", leave=False) as bar:
        for number in numbers:
            if len(found) >= most or (len(found) >= fewest and num_positions >= ENOUGH_POSITIONS):
                break
            split, row = rows.find(number)
            try:
                one = processor.encode(split[row])
            except DataError:
                num_unreadable += 1
                continue
            if one.key not in reader:
                num_not_cached += 1
            elif one.key not in found:
                found[one.key] = one
                num_positions += one.num_positions
                bar.update()
    if not found:
        raise DataError(
            f"cache {reader.location}: none of {num_not_cached + num_unreadable} rows of {rows.splits[0].source} "
            "that were looked at is in it. It was captured from other data, or with another template"
        )
    return Sample(list(found.values()), num_not_cached, num_unreadable)


def hidden_states(
    encoded: Sequence[Encoded], processor: ExampleProcessor, teacher: Teacher, *, max_tokens: int
) -> tuple[Tensor, int]:
    """(N, D) of all answer positions, in the order of the examples, in host memory; examples of the largest batch."""
    runner = BatchRunner(max_tokens, may_shrink=not teacher.is_shared)
    found: dict[int, Tensor] = {}
    largest = 0

    def forward(indices: list[int]) -> Tensor:
        batch = processor.collate([encoded[index] for index in indices]).to(teacher.device)
        return teacher.hidden(batch).cpu()

    lengths = [len(one.input_ids) for one in encoded]
    desc = "teacher, alone" if max_tokens == 1 else "teacher"
    for indices, hidden_ND in by_examples(runner.run(lengths, forward), total=len(encoded), desc=desc):
        parts = hidden_ND.split([encoded[index].num_positions for index in indices])
        found.update(zip(indices, parts, strict=True))
        largest = max(largest, len(indices))
    return torch.cat([found[index] for index in range(len(encoded))]), largest


def show(found: Audit) -> None:
    """A table for people."""
    click.echo(
        f"cache {found.cache} against {found.teacher}: {found.num_examples} examples, {found.num_positions} positions"
    )
    if found.tail is not None:
        click.echo(f"  gradient and reconstruction with tail {found.tail} (loss.tail)")
    if found.num_not_cached or found.num_unreadable:
        click.echo(
            f"  left out: {found.num_not_cached} row(s) are not in the cache, {found.num_unreadable} cannot be read"
        )
    for result in found.results:
        click.echo(f"\ntemperature {result.temperature:g}{'cache':>38}{'noise floor':>14}")
        for label, measured, form, note in _lines(result):
            cells = [
                "-" if value is None else f"{value:{form}}" for value in (measured.cache, measured.floor)
            ]
            click.echo(f"  {label:<38}{cells[0]:>14}{cells[1]:>14}{note}")


def _lines(result: AtTemperature) -> list[tuple[str, Measured, str, str]]:
    """Label, values, their format, and what is to be said of them."""
    lines = [
        ("top-1 agreement", result.top1_agreement, ".4%", ""),
        ("kept mass", result.kept_mass, ".6f", ""),
        (f"bias in log-prob{_scatter(result.logprob_bias_error)}, nats", result.logprob_bias, "+.2e", ""),
        (f"bias at the answer{_scatter(result.answer_bias_error)}", result.answer_bias, "+.2e", ""),
        ("KL to the reconstruction, nats", result.kl, ".3g", ""),
    ]
    for size, measured in result.gradient_error.items():
        note = f"  (needs {size:,} positions)" if measured.cache is None else ""
        lines.append((f"head gradient, {size:,} positions: error", measured, ".3g", note))
        lines.append(("  cosine", result.gradient_cosine[size], ".6f", ""))
    return lines


def _scatter(standard_error: float | None) -> str:
    return "" if standard_error is None else f" (+- {standard_error:.1e})"
