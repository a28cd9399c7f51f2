"""What a capture will take, and whether it pays, from a sample of the data: ``teacher-cache estimate RECIPE``.

    found = estimate(recipe, world, num_examples=64, num_ranks=8, num_students=3, num_epochs=2, taus=(1/64, 1/512))

Examples and positions are counted over all of the data; entries, bytes and times are measured on examples spread
evenly over it.  The sample is written to real shards, with the recipe's policy and at each ``tau``, in a folder
that is removed again: nothing is added to the recipe's cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from shared.batching import BatchRunner
from shared.cache import CacheReader, CacheWriter, Identity, Row
from shared.cache.index import as_key_array
from shared.cache.shard import MAX_PAYLOAD_BYTES
from shared.capture.planning import CaptureData, NumberedRows, identity_of, survey
from shared.data.collation import Batch, Encoded
from shared.data.processing import ExampleProcessor
from shared.data.unseen import encoded_twice
from shared.errors import DataError, RecipeError
from shared.progress import by_examples, progress
from shared.recipes import CacheConfig, Recipe
from shared.recipes.policies import Policy, Threshold
from shared.reports.break_even import TeacherCosts
from shared.runtime import World
from shared.same_prompts import open_processor_of
from shared.sparse import position_seeds
from shared.split_check import count_positions
from stage1_teacher.capturing.shards import CapturedBatch
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage1_teacher.capturing.visual_gain import visual_gain

TAUS = (1 / 16, 1 / 64, 1 / 256, 1 / 512, 1 / 1024)
NO_WEIGHTS = "0" * 64  # the fingerprint in the sample's own shards, which nobody keeps


@dataclass(frozen=True)
class Size:
    """Of the whole cache under one policy, projected."""

    policy: str
    entries_per_position: float
    bytes_per_position: float
    total_bytes: int
    is_recipe: bool


@dataclass(frozen=True)
class Times:
    """Seconds an example on one device, measured on the sample.

    live      the teacher's body, and its head and log-softmax at answer positions: what a live teacher costs; with
              ``cache.visual_gain`` its second pass too, ``unseen`` of it
    capture   the same, and targets, hand-over and payloads: at least ``live``
    pictures  reading and encoding an example, in one process
    reading   an example's targets from the cache, in one process
    """

    live: float
    capture: float
    pictures: float
    reading: float
    unseen: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Everything that ``show`` prints; ``costs`` are of ``num_ranks`` devices."""

    num_sampled: int
    num_examples: int
    num_positions: int
    num_shards: int
    examples_per_shard: int
    num_ranks: int
    num_students: int
    num_epochs: float
    times: Times
    sizes: tuple[Size, ...]
    costs: TeacherCosts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        students = {"num_students": self.num_students, "num_epochs": self.num_epochs}
        return asdict(self) | {
            "costs": self.costs.to_json(),
            "live_s": self.costs.live_s(**students),  # type: ignore[arg-type]
            "cached_s": self.costs.cached_s(**students),  # type: ignore[arg-type]
        }


def estimate(
    recipe: Recipe,
    world: World,
    *,
    num_examples: int = 64,
    num_ranks: int | None = None,
    num_students: int = 1,
    num_epochs: float | None = None,
    taus: Sequence[float] = TAUS,
) -> Estimate:
    """Runs the teacher over a sample, on this process's device, or on those of the ranks that share a copy.

    num_ranks  to project for; None: as many as one copy of the teacher takes
    Raises   TeachonceError  of the kind that fits, as a capture would
    """
    if recipe.teacher is None or recipe.cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: an estimate needs a teacher and a cache section")
    num_ranks = num_ranks or recipe.teacher.ranks_per_copy
    recipe.teacher.require_ranks(num_ranks)
    processor = open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
    data = survey(recipe, processor)
    teacher = load_teacher(
        recipe.teacher,
        num_token_ids=processor.num_token_ids,
        num_answer_ids=processor.num_answer_ids,
        world=world,
    )
    sample = Sample.take(data, processor, recipe.cache, num_examples)
    timed = sample.measure(teacher, processor)
    totals = count_all(recipe, data, processor)
    policies = [recipe.cache.policy, *(Threshold(tau=tau) for tau in sorted(taus, reverse=True))]
    sizes, reading_s = [], 0.0
    for policy in progress(dict.fromkeys(policies), desc="measuring sizes", unit="policy", leave=False):
        rows = sample.rows(teacher, processor, policy)
        identity = identity_of(with_policy(recipe, policy), processor, data, weights_fingerprint=NO_WEIGHTS)
        measured, seconds = write_sample(identity, rows, shards=totals.shards, positions=totals.positions)
        is_recipe = policy == recipe.cache.policy
        reading_s = seconds / len(rows) if is_recipe else reading_s
        sizes.append(replace(measured, is_recipe=is_recipe))
    times = replace(timed, reading=reading_s)
    return Estimate(
        num_sampled=len(sample.encoded),
        num_examples=totals.examples,
        num_positions=totals.positions,
        num_shards=totals.shards,
        examples_per_shard=min(recipe.cache.examples_per_shard, totals.examples),
        num_ranks=num_ranks,
        num_students=num_students,
        num_epochs=epochs_of(recipe, totals.training_examples) if num_epochs is None else num_epochs,
        times=times,
        sizes=tuple(sorted(sizes, key=lambda size: size.bytes_per_position)),
        costs=teacher_costs(
            times,
            totals,
            capture_workers=recipe.cache.num_workers,
            student_workers=recipe.run.num_workers,
            num_ranks=num_ranks,
            ranks_per_copy=recipe.teacher.ranks_per_copy,
        ),
    )


@dataclass(frozen=True)
class Totals:
    """Of all the data that the recipe wants captured, equal rows once."""

    examples: int
    positions: int
    shards: int
    training_examples: int


def count_all(recipe: Recipe, data: CaptureData, processor: ExampleProcessor) -> Totals:
    """Positions are counted from the answers alone; a row that is equal to another one counts in them."""
    assert recipe.cache is not None
    positions = sum(count_positions(part.split, part.rows, processor) for part in data.keyed)
    keys = as_key_array(data.keys)
    examples = len(np.unique(keys))
    return Totals(
        examples=examples,
        positions=round(positions * examples / len(keys)),
        shards=-(-examples // recipe.cache.examples_per_shard),
        training_examples=sum(
            len(part.keys) for part in data.keyed if part.split.name == recipe.data.splits.train
        ),
    )


def teacher_costs(
    times: Times,
    totals: Totals,
    *,
    capture_workers: int,
    student_workers: int,
    num_ranks: int,
    ranks_per_copy: int = 1,
) -> TeacherCosts:
    """A capture is as fast as the slower of a rank's device and its workers; without workers it does both in turn.

    Ranks that share a copy of the teacher work on the same examples.

    Reading the cache is the part of the student's workers, or of its own process where it has none.
    """
    if capture_workers:
        example_s = max(times.capture, times.pictures / capture_workers)
    else:
        example_s = times.capture + times.pictures
    num_copies = num_ranks // ranks_per_copy
    return TeacherCosts(
        capture_s=totals.examples * example_s / num_copies,
        live_epoch_s=totals.training_examples * times.live / num_copies,
        cached_epoch_s=totals.training_examples * times.reading / max(1, student_workers) / num_ranks,
    )


def epochs_of(recipe: Recipe, num_training_examples: int) -> float:
    """Epochs that the recipe's student takes."""
    optimization = recipe.optimization
    if optimization.num_epochs is not None:
        return optimization.num_epochs
    assert optimization.max_steps is not None  # the recipe has one of the two
    return optimization.max_steps * optimization.global_batch_size / max(1, num_training_examples)


def with_policy(recipe: Recipe, policy: Policy) -> Recipe:
    assert recipe.cache is not None
    return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"policy": policy})})


@dataclass(frozen=True, eq=False)
class Sample:
    """Encoded examples, spread evenly over the data, in the batches that a capture would make of them."""

    encoded: list[Encoded]
    batches: list[list[Encoded]]
    cache: CacheConfig
    encoding_s: float

    @classmethod
    def take(
        cls, data: CaptureData, processor: ExampleProcessor, cache: CacheConfig, num_examples: int
    ) -> Sample:
        """Raises   DataError  when none of the chosen rows can be used"""
        rows = NumberedRows(tuple(part.split for part in data.keyed))
        firsts = np.unique(as_key_array(data.keys), return_index=True)[1]
        numbers = data.numbers[np.sort(firsts)].tolist()
        chosen = [numbers[i * len(numbers) // num_examples] for i in range(num_examples)]
        encoded, begin = [], time.perf_counter()
        for number in progress(dict.fromkeys(chosen), desc="reading the sample", unit="ex", leave=False):
            split, row = rows.find(number)
            try:
                encoded.append(encoded_twice(processor, split[row], cache.visual_gain))
            except DataError:
                continue
        if not encoded:
            raise DataError(
                f"none of the {num_examples} sampled rows can be used; run `check` for the reasons"
            )
        return cls(encoded, [], cache, time.perf_counter() - begin)

    def measure(self, teacher: Teacher, processor: ExampleProcessor) -> Times:
        """The teacher's times, after one batch that does not count; fills ``batches``."""

        chunk = teacher.chunk_positions(self.cache.chunk_size)

        def forward(indices: list[int]) -> tuple[float, float, float]:
            encoded = [self.encoded[index] for index in indices]
            batch = processor.collate(encoded).to(teacher.device)
            unseen = [one.unseen for one in encoded if one.unseen is not None]
            live_s = timed(lambda: live(teacher, batch, chunk), teacher.device)
            unseen_s = 0.0
            if unseen:
                again = processor.collate(unseen).to(teacher.device)
                unseen_s = timed(lambda: live(teacher, again, chunk), teacher.device)
            capture_s = timed(
                lambda: self._rows_of(teacher, processor, batch, encoded, self.cache.policy), teacher.device
            )
            self.batches.append(encoded)
            live_s += unseen_s
            # a capture does all that and more: longer is noise
            return min(live_s, capture_s), capture_s, unseen_s

        lengths = [len(one.input_ids) for one in self.encoded]
        runner = BatchRunner(self.cache.batch_tokens, may_shrink=not teacher.is_shared)
        live(teacher, processor.collate(self.encoded[:1]).to(teacher.device), chunk)
        number = len(self.encoded)
        done = by_examples(runner.run(lengths, forward), total=number, desc="timing the teacher")
        seconds = [result for _, result in done]
        return Times(
            live=sum(one for one, _, _ in seconds) / number,
            capture=sum(one for _, one, _ in seconds) / number,
            pictures=self.encoding_s / number,
            reading=0.0,
            unseen=sum(one for _, _, one in seconds) / number,
        )

    def rows(self, teacher: Teacher, processor: ExampleProcessor, policy: Policy) -> list[Row]:
        """The sample's rows under a policy."""
        found: list[Row] = []
        for encoded in self.batches:
            batch = processor.collate(encoded).to(teacher.device)
            found += self._rows_of(teacher, processor, batch, encoded, policy)
        return found

    def _rows_of(
        self,
        teacher: Teacher,
        processor: ExampleProcessor,
        batch: Batch,
        encoded: Sequence[Encoded],
        policy: Policy,
    ) -> list[Row]:
        seeds_N = torch.cat([position_seeds(self.cache.seed, one.key, one.num_positions) for one in encoded])
        chunk_size = teacher.chunk_positions(self.cache.chunk_size)
        targets, ce_N = teacher.targets(
            batch,
            seeds_N.to(teacher.device),
            policy=policy,
            temperatures=self.cache.temperatures,
            chunk_size=chunk_size,
        )
        gain_N = None
        if self.cache.visual_gain is not None:
            gain_N = visual_gain(
                teacher,
                lambda some: processor.collate(some).to(teacher.device),
                encoded,
                ce_N,
                chunk_size=chunk_size,
                names=[one.key.hex() for one in encoded],
            )
        return CapturedBatch.of("sample", encoded, targets, ce_N, gain_N).rows()


def live(teacher: Teacher, batch: Batch, chunk_size: int) -> None:
    """What a teacher beside the student would have to do for a batch."""
    hidden_ND = teacher.hidden(batch)
    for start in range(0, len(hidden_ND), chunk_size):
        teacher.logprobs(hidden_ND[start : start + chunk_size])


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the work has ended, on the device as well."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def write_sample(identity: Identity, rows: list[Row], *, shards: int, positions: int) -> tuple[Size, float]:
    """Writes the rows as a cache and reads them again: the size of all data so, and the seconds of reading.

    A shard's own bytes, apart from its rows', are the difference between the rows in two shards and in one.
    """
    with tempfile.TemporaryDirectory(prefix="teachonce-estimate-") as folder:
        one = write_cache(Path(folder) / "one", identity, rows, examples_per_shard=len(rows))
        two = write_cache(Path(folder) / "two", identity, rows, examples_per_shard=-(-len(rows) // 2))
        found = one.manifest.totals
        per_shard = max(0, two.manifest.totals.bytes - found.bytes) if len(rows) > 1 else 0
        keys = [row.key for row in rows]
        one.targets(one.rows(keys))  # hashes the shard, which an epoch does not do for every few rows
        begin = time.perf_counter()
        one.targets(one.rows(keys))
        reading_s = time.perf_counter() - begin
    in_rows = (found.bytes - per_shard) * positions / found.positions
    total = round(in_rows + per_shard * shards)
    policy = identity.targets.policy
    size = Size(
        policy=describe(policy),
        entries_per_position=found.entries / found.positions,
        bytes_per_position=total / positions,
        total_bytes=total,
        is_recipe=False,
    )
    return size, reading_s


def write_cache(path: Path, identity: Identity, rows: list[Row], *, examples_per_shard: int) -> CacheReader:
    by_key = {row.key: row for row in rows}
    with CacheWriter.open(str(path), identity, created_by={}) as writer:
        numbered = [(key, number) for number, key in enumerate(by_key)]
        plan = writer.plan(numbered, examples_per_shard=examples_per_shard, skipped=[])
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for key in unit.keys:
                    shard.add(by_key[key])
        writer.commit(plan)
    return CacheReader(str(path))


def describe(policy: Policy) -> str:
    """Like ``threshold 1/512`` or ``top_k 50``."""
    if isinstance(policy, Threshold):
        inverse = 1 / policy.tau
        return (
            f"threshold 1/{inverse:.0f}"
            if abs(inverse - round(inverse)) < 1e-6
            else f"threshold {policy.tau:g}"
        )
    settings = policy.model_dump(exclude={"kind"})
    return " ".join([policy.kind, *(f"{value:g}" for value in settings.values())])


def show(found: Estimate) -> None:
    """A page for people."""
    times, costs = found.times, found.costs
    second = f", {1e3 * times.unseen:.1f} ms of that its pass without pictures" if times.unseen else ""
    click.echo(
        f"measured on {found.num_sampled} examples, spread over {found.num_examples:,} with "
        f"{found.num_positions:,} positions\n"
        f"one example takes {1e3 * times.capture:.1f} ms to capture, {1e3 * times.live:.1f} ms of them the teacher"
        f"{second}; "
        f"{1e3 * times.pictures:.1f} ms to read and encode in one process\n"
    )
    click.echo(f"  {'policy':<20}{'entries':>9}{'bytes':>8}   {'cache':>10}")
    for size in found.sizes:
        mark = "  <- the recipe" if size.is_recipe else ""
        click.echo(
            f"  {size.policy:<20}{size.entries_per_position:>9.1f}{size.bytes_per_position:>8.1f}   "
            f"{size.total_bytes / 2**20:>6.1f} MiB{mark}"
        )
    click.echo("  entries and bytes are means over positions, keys and headers counted\n")
    own = next(size.total_bytes for size in found.sizes if size.is_recipe)
    shard_bytes = own * found.examples_per_shard // found.num_examples
    if shard_bytes > MAX_PAYLOAD_BYTES:
        click.echo(
            f"note: a shard of {found.examples_per_shard:,} examples would take {shard_bytes / 2**30:.1f} GiB, it "
            "holds less than 2 GiB. Set cache.examples_per_shard lower\n"
        )
    click.echo(
        f"capture on {found.num_ranks} device(s): {duration(costs.capture_s)}, {found.num_shards} shard(s)\n"
        f"an epoch costs {duration(costs.live_epoch_s)} with a live teacher, {duration(costs.cached_epoch_s)} from "
        "the cache\n"
        f"over all students together, the cache {costs.pays_after()}\n"
        f"{found.num_students} student(s) of {found.num_epochs:.3g} epoch(s): the teacher's part is "
        f"{duration(costs.live_s(num_students=found.num_students, num_epochs=found.num_epochs))} live, "
        f"{duration(costs.cached_s(num_students=found.num_students, num_epochs=found.num_epochs))} with the cache"
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
