"""Is the cache faithful?  The teacher runs again over sampled rows, and what it says is compared with what is kept.

    found = audit(recipe, reader, world)
    show(found)

Beside each figure stands its *noise floor*: the same figure for the same teacher run a second time with each
example in a batch of its own.  A cache cannot be closer to its teacher than the teacher is to itself.  Where the
first pass had no larger batches there is no floor: both passes would be the same one.

What a student feels is the gradient of the head, as the trainer's loss makes it, with the recipe's ``loss.tail``.
Its error is measured for a student that knows how often each token comes and nothing else: q, the mean of the
teacher's distributions over the audited positions.  Hidden states are the teacher's, projected to at most 128
dimensions, which keeps norms and angles.

Legend: N positions, n of a block, V vocabulary, E entries, C projected hidden dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from torch import Tensor

from shared.cache import CacheReader
from shared.config import Recipe
from shared.errors import CacheMismatchError, DataError, RecipeError
from shared.processing import Encoded, ExampleProcessor, open_processor
from shared.progress import progress
from shared.runtime import World
from shared.sparse import SparseTargets
from shared.survey import inputs_identity
from stage1_teacher.batching import BatchRunner
from stage1_teacher.head_gradient import BATCHES, BLOCK, HeadGradients, Measured, pull
from stage1_teacher.planning import NumberedRows, open_rows
from stage1_teacher.teacher import Teacher, load_teacher

PROJECTED = 128
DEFAULT_TAIL = "ghost"  # that of the trainer's loss
WHOLE_TAILS = ("ghost", "uniform")  # which leave no token without mass
TRIES = 4  # rows looked at for each that is wanted: some may have been left out of the cache
# Where no number of examples is asked for: as many as the largest batch needs, but not so many that all their
# pictures, which are held at once, take much memory.
MIN_EXAMPLES, MAX_EXAMPLES = 64, 256
ENOUGH_POSITIONS = max(BATCHES)


@dataclass(frozen=True)
class AtTemperature:
    """How far the cache is from the teacher at one temperature.

    top1_agreement    share of positions where no entry weighs more than the teacher's most likely token
    kept_mass         sum of the weights of a position
    logprob_bias      mean over positions of sum_v (p^ - p)(v) log p(v), nats: zero in expectation where the
                      targets are unbiased; ``logprob_bias_error`` is its standard error over examples, None for one
    answer_bias       mean of (p^ - p) at the answer's token, and its standard error
    kl                KL(teacher || what the loss takes the cache for), nats: kept tokens, the rest spread evenly by
                      the tail mode ``uniform``, and as q has it by ``ghost``.  None where tokens are left
                      without mass, as by a draw, ``renormalize`` and ``drop``: it would be infinite
    gradient_error    by number of positions, of each in ``BATCHES``: relative error of the head's gradient, mean
                      over such batches; it falls with their size, so it is None where there were too few positions
    gradient_cosine   the same, of the angle between both gradients
    """

    temperature: float
    top1_agreement: Measured
    kept_mass: Measured
    logprob_bias: Measured
    logprob_bias_error: float | None
    answer_bias: Measured
    answer_bias_error: float | None
    kl: Measured
    gradient_error: dict[int, Measured]
    gradient_cosine: dict[int, Measured]


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
    processor = open_processor(recipe.teacher.model, recipe.data, revision=recipe.teacher.revision)
    require_inputs(reader, recipe, processor)
    sample = choose(reader, open_rows(recipe), processor, num_examples=num_examples, seed=seed)
    encoded = sample.encoded
    if sample.num_positions < min_positions:
        raise DataError(
            f"cache {reader.location}: {len(encoded)} examples with {sample.num_positions:,} positions found, a "
            f"bound on the head's gradient over {min_positions:,} positions needs as many. Take more (--examples), "
            "or bound the error over fewer (--max-error-positions)"
        )
    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
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
    targets, tail = reader.targets(rows), recipe.loss.tail or DEFAULT_TAIL
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
    for number in progress(numbers, desc="reading the sample", unit="ex", leave=False):
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
    runner = BatchRunner(max_tokens, may_shrink=not teacher.is_sharded)
    found: dict[int, Tensor] = {}
    largest = 0

    def forward(indices: list[int]) -> Tensor:
        batch = processor.collate([encoded[index] for index in indices]).to(teacher.device)
        return teacher.hidden(batch).cpu()

    lengths = [len(one.input_ids) for one in encoded]
    for indices, hidden_ND in progress(
        runner.run(lengths, forward), desc="teacher", unit="batch", leave=False
    ):
        parts = hidden_ND.split([encoded[index].num_positions for index in indices])
        found.update(zip(indices, parts, strict=True))
        largest = max(largest, len(indices))
    return torch.cat([found[index] for index in range(len(encoded))]), largest


@dataclass(frozen=True, eq=False)
class Comparison:
    """Positions in random order, so that a batch of them holds many examples, as a training step does."""

    teacher: Teacher
    hidden_ND: Tensor
    again_ND: Tensor | None  # of the same positions, from other batches
    features_NC: Tensor
    labels_N: Tensor
    example_N: Tensor
    targets: SparseTargets
    tail: str

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        encoded: Sequence[Encoded],
        targets: SparseTargets,
        hidden_ND: Tensor,
        again_ND: Tensor | None,
        *,
        tail: str,
        seed: int,
    ) -> Comparison:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(hidden_ND), generator=generator)
        counts = torch.tensor([one.num_positions for one in encoded])
        width = hidden_ND.shape[1]
        features_ND = hidden_ND.float()
        if width > PROJECTED:
            features_ND = (
                features_ND @ torch.randn(width, PROJECTED, generator=generator) / math.sqrt(PROJECTED)
            )
        return cls(
            teacher=teacher,
            hidden_ND=hidden_ND[order],
            again_ND=None if again_ND is None else again_ND[order],
            features_NC=features_ND[order],
            labels_N=torch.cat([one.answer_ids for one in encoded])[order],
            example_N=torch.arange(len(encoded)).repeat_interleave(counts)[order],
            targets=targets.select(order),
            tail=tail,
        )

    @torch.inference_mode()
    def at(self, temperature: float) -> AtTemperature:
        """Two passes: the mean distribution, which is the student's, then everything against it."""
        total_V = torch.zeros(self.teacher.num_token_ids, dtype=torch.float64)
        for block in self._blocks():
            total_V += self._probs(self.hidden_ND, block, temperature).sum(0, dtype=torch.float64)
        student_V = total_V / len(self.labels_N)
        columns: dict[str, list[Tensor]] = {}

        def add(figures: dict[str, Tensor], name: str) -> None:
            for figure, values_n in figures.items():
                columns.setdefault(f"{figure} {name}", []).append(values_n)

        gradients = HeadGradients(len(self.labels_N))
        for block in progress(
            list(self._blocks()), desc=f"comparing at {temperature:g}", unit="block", leave=False
        ):
            live_nV = self._probs(self.hidden_ND, block, temperature)
            again_nV = None if self.again_ND is None else self._probs(self.again_ND, block, temperature)
            pull_nV = pull(self._targets(block), student_V, temperature=temperature, tail=self.tail)
            found = self._figures(live_nV, self._kept(block, temperature), block)
            if not self.targets.policy.is_sampled and self.tail in WHOLE_TAILS:
                found["kl"] = _kl(live_nV, (student_V + pull_nV).float())
            add(found, "cache")
            if again_nV is not None:
                add(self._figures(live_nV, again_nV, block) | {"kl": _kl(live_nV, again_nV)}, "floor")
            gradients.add(
                self.features_NC[block],
                live_nV=(live_nV - student_V).float(),
                cache_nV=pull_nV.float(),
                floor_nV=None if again_nV is None else (again_nV - student_V).float(),
            )
        return self._result(
            temperature, {name: torch.cat(parts) for name, parts in columns.items()}, gradients
        )

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.labels_N), BLOCK):
            yield slice(start, min(start + BLOCK, len(self.labels_N)))

    def _probs(self, hidden_ND: Tensor, block: slice, temperature: float) -> Tensor:
        """The teacher's distributions (n, V) fp32."""
        logprobs_nV = self.teacher.logprobs(hidden_ND[block].to(self.teacher.device)).cpu()
        return (logprobs_nV / temperature).softmax(-1) if temperature != 1.0 else logprobs_nV.exp()

    def _targets(self, block: slice) -> SparseTargets:
        return self.targets.slice(block.start, block.stop)

    def _kept(self, block: slice, temperature: float) -> Tensor:
        """The cache's weights, (n, V) fp32."""
        part = self._targets(block)
        kept_nV = torch.zeros(part.num_positions, self.teacher.num_token_ids)
        kept_nV.index_put_((part.position_index, part.ids.long()), part.weights(temperature), accumulate=True)
        return kept_nV

    def _figures(self, live_nV: Tensor, other_nV: Tensor, block: slice) -> dict[str, Tensor]:
        """One number a position, (n,), of each figure."""
        difference_nV = other_nV - live_nV
        labels_n1 = self.labels_N[block, None]
        is_top_n1 = other_nV.gather(1, live_nV.argmax(-1, keepdim=True)) == other_nV.amax(-1, keepdim=True)
        return {
            "top1": is_top_n1.squeeze(1).float(),
            "mass": other_nV.sum(-1),
            "logprob": (difference_nV * _log(live_nV)).sum(-1),
            "answer": difference_nV.gather(1, labels_n1).squeeze(1),
        }

    def _result(
        self, temperature: float, columns: dict[str, Tensor], gradients: HeadGradients
    ) -> AtTemperature:
        def both(figure: str) -> Measured:
            found = [columns.get(f"{figure} {name}") for name in ("cache", "floor")]
            cache, floor = (None if one is None else one.double().mean().item() for one in found)
            return Measured(cache, floor)

        return AtTemperature(
            temperature=temperature,
            top1_agreement=both("top1"),
            kept_mass=both("mass"),
            logprob_bias=both("logprob"),
            logprob_bias_error=self._standard_error(columns["logprob cache"]),
            answer_bias=both("answer"),
            answer_bias_error=self._standard_error(columns["answer cache"]),
            kl=both("kl"),
            gradient_error=gradients.errors(),
            gradient_cosine=gradients.cosines(),
        )

    def _standard_error(self, values_N: Tensor) -> float | None:
        """Of the mean over positions: examples are independent, their positions are not.  None for one example."""
        num_examples = int(self.example_N.max()) + 1
        if num_examples == 1:
            return None
        centred_N = values_N.double() - values_N.double().mean()
        sums_B = torch.zeros(num_examples, dtype=torch.float64).index_add_(0, self.example_N, centred_N)
        return sums_B.norm().item() / len(values_N)


def _kl(live_nV: Tensor, other_nV: Tensor) -> Tensor:
    """KL(live || other), (n,)."""
    return (live_nV * (_log(live_nV) - _log(other_nV))).sum(-1)


def _log(probs_nV: Tensor) -> Tensor:
    return probs_nV.clamp_min(1e-30).log()


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
