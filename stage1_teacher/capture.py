"""Stage one, start to end: what is missing is planned, captured unit by unit, and committed once.

    capture(recipe, world, stop)       called by all ranks; returns an exit status

The first rank reads the data and plans.  Then the ranks part: each copy of the teacher claims units in the cache's
folder, as do the ranks of other jobs that capture the same there.  Who is lost costs what it had in hand; who comes
late finds the plan.  Whoever sees the last shard commits.  A unit's shard depends on the unit alone.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from shared.batching import BatchRunner
from shared.cache import CacheBusyError, CacheReader, CacheWriter, Claims, Identity, Manifest, Plan, Unit
from shared.cache.claimant import (
    is_gone,
    remove_claims,
    remove_claims_of_the_dead,
    somebody_may_be_at_work,
)
from shared.cache.commit import require_few_skipped
from shared.cache.layout import CLAIMS, LIBRARY_LOG_NAME, PLAN_NAME, shard_names
from shared.cache.lock import WaitStoppedError
from shared.cache.plan import MAX_PLAN_BYTES
from shared.cache.storage import open_folder
from shared.cache.writer import has_shards_of
from shared.capture.opening import created_by_versions, open_planned
from shared.capture.planning import (
    CaptureData,
    identity_of,
    is_same_capture,
    open_rows,
    survey,
)
from shared.capture.windows import EncodedWindow, WindowSource, encoded_windows, lengths_of
from shared.completeness import are_skipped, broken_shards
from shared.data.collation import Batch, Encoded
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, DataError, RecipeError, TeachonceError, listed
from shared.library_output import keep_library_output
from shared.model_check import check_model, two_examples
from shared.model_notes import notes_on_files
from shared.models.vlm import load_config
from shared.recipes import CacheConfig, Recipe, TeacherConfig, dump_recipe
from shared.runtime import World, environment
from shared.same_prompts import open_processor_of
from shared.same_teacher import teacher_content, teacher_stamp
from shared.sparse import position_seeds
from shared.stopping import INTERRUPTED_STATUS, StopRequest, command_to_go_on
from stage1_teacher.capturing.handover import BackgroundWriter
from stage1_teacher.capturing.lockstep import Lockstep
from stage1_teacher.capturing.progress import Tally, require_space, totals_of
from stage1_teacher.capturing.shards import CapturedBatch, ShardAssembler
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage1_teacher.capturing.visual_gain import visual_gain

Value = TypeVar("Value")
MAX_PENDING_BATCHES = 4  # on their way to disk
LAST_WORD_S = 5.0  # how long a stopped capture waits for the lock, to say in the log that it was stopped
SETTLE_S = 60.0  # how long files of other machines may take to show on a network file system


@dataclass(frozen=True, eq=False)
class Assignment:
    """What the first rank tells the others.

    pending      the units without a finished shard
    num_refused  examples that the finished ones leave out, as far as they were read
    job          by which ranks of one start know each other
    """

    identity: Identity
    plan: Plan
    pending: list[Unit]
    num_refused: int
    created_by: dict[str, str]
    job: str


def capture(recipe: Recipe, world: World, stop: StopRequest) -> int:
    """Makes the recipe's cache hold all its data; returns the exit status.

    Raises   TeachonceError  of the kind that fits
    """
    if recipe.teacher is None or recipe.cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: a capture needs a teacher and a cache section")
    location = recipe.cache.location  # refuses several caches, before any row is read
    recipe.teacher.require_ranks(world.size)
    processor = open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
    data = survey(recipe, processor, world)
    if world.by_main(lambda: nothing_to_do(recipe, processor, data)):
        if world.is_main:
            remove_committed_plan(location, stop)
            tqdm.write(f"cache {location} holds all of the data; nothing to capture")
        return 0
    if world.is_main:
        if num_outvoted := sum(part.num_outvoted for part in data.keyed):
            tqdm.write(f"note: {num_outvoted:,} answer(s) are dropped: not what most of their row say")
        tqdm.write(f"teacher {recipe.teacher.model} is run over {len(data.keys)} examples; cache {location}")
        for note in _notes_on(recipe.teacher, data, world):
            tqdm.write(f"note: {note}")
    teacher = load_teacher(
        recipe.teacher,
        num_token_ids=processor.num_token_ids,
        num_answer_ids=processor.num_answer_ids,
        world=world,
    )
    if teacher.is_shared:
        check_teacher(recipe, processor, teacher)
    else:
        world.by_main(lambda: check_teacher(recipe, processor, teacher))
    with contextlib.ExitStack() as planning:  # in which others see the first rank at work
        try:
            writer, assignment = open_cache(recipe, processor, data, teacher, world, planning, stop)
        except WaitStoppedError as told:
            if world.is_main:
                tqdm.write(f"stopped: {told}. To go on: {command_to_go_on(resume=False)}")
            return INTERRUPTED_STATUS
        if "://" not in location:
            keep_library_output(Path(location) / LIBRARY_LOG_NAME)
        teacher = teacher.led(world)
        if not teacher.is_sharded:
            world.part(from_all_but=teacher.followers.waiting if teacher.followers is not None else None)
        if teacher.is_follower:
            return teacher.follow()
        return Lead(recipe, processor, teacher, writer, assignment, world, stop, planning).run()


def _notes_on(teacher: TeacherConfig, data: CaptureData, world: World) -> Iterator[str]:
    config = load_config(teacher.model, teacher.revision)
    is_shared = world.size > 1 and (teacher.shard or teacher.ranks_per_copy > 1)
    return notes_on_files(config, data.keyed, whose=f"teacher {teacher.model}", dequantize=is_shared)


def nothing_to_do(recipe: Recipe, processor: ExampleProcessor, data: CaptureData) -> bool:
    """Whether a committed cache already is what the recipe asks for; opens no weights."""
    assert recipe.cache is not None
    try:
        reader = CacheReader(recipe.cache.location)
    except (CacheFormatError, FileNotFoundError):
        return False
    wanted = data.keys[~are_skipped(data.keys, reader)]
    covered = bool(reader.contains(wanted).all())
    if not covered or not is_same_capture(reader, recipe, processor, data):
        return False
    broken = broken_shards(reader, wanted)
    for name in broken:
        tqdm.write(
            f"cache {recipe.cache.location}: {name} is gone or damaged; its examples are captured again"
        )
    return not broken


def check_teacher(recipe: Recipe, processor: ExampleProcessor, teacher: Teacher) -> None:
    """Of a teacher that ranks share called by all of them.

    Raises   RecipeError  when the teacher does not compute what is taken for granted, or cannot run here
    """
    assert recipe.teacher is not None
    examples = two_examples(WindowSource(open_rows(recipe), processor).usable())
    check_model(teacher.model, processor, examples, device=teacher.device)


def parallel_facts(teacher: TeacherConfig) -> dict[str, str]:
    """For the manifest: sums over other numbers of ranks round differently."""
    sizes = {"tensor": teacher.tensor, "expert": teacher.expert}
    shared = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return {"parallel": shared} if shared else {}


def remove_committed_plan(location: str, stop: StopRequest) -> None:
    """Removes plan and claims of a capture that was killed right after its commit: they add to an older manifest.

    So do those of a repair killed right before: with the lost shards back, the cache was whole without a commit.
    Another capture's plan, which adds to this one, stays.
    """
    folder, identity = open_folder(location), CacheReader(location).manifest.identity
    if folder.size(PLAN_NAME) is None and not folder.names(CLAIMS):
        return
    # A cache at work, or one that may not be written, is no worse for it.
    with (
        contextlib.suppress(TeachonceError, OSError),
        CacheWriter.open(
            location, identity, created_by={}, for_a_moment=True, is_stopped=lambda: stop.received
        ) as writer,
    ):
        if folder.size(PLAN_NAME) is not None:
            plan = Plan.decode(folder.read(PLAN_NAME, max_bytes=MAX_PLAN_BYTES), where=folder.where)
            manifest = writer.manifest
            if manifest is not None and (
                plan.base != manifest.sha256
                or (has_shards_of(manifest, plan) and not somebody_may_be_at_work(folder))
            ):
                folder.remove(PLAN_NAME)
        if folder.size(PLAN_NAME) is None:
            remove_claims_of_the_dead(folder)


def open_cache(
    recipe: Recipe,
    processor: ExampleProcessor,
    data: CaptureData,
    teacher: Teacher,
    world: World,
    planning: contextlib.ExitStack,
    stop: StopRequest,
) -> tuple[CacheWriter, Assignment]:
    """The first rank opens the cache and plans; the others join it.

    planning  to be closed when the first rank has claims
    """
    assert recipe.cache is not None
    cache = recipe.cache
    opened: list[CacheWriter] = []  # of the first rank; nothing that can be sent to others

    def plan() -> Assignment:
        assert teacher.weights_fingerprint is not None
        identity = identity_of(recipe, processor, data, weights_fingerprint=teacher.weights_fingerprint)
        assert recipe.teacher is not None
        facts = teacher_content(recipe.teacher) | parallel_facts(recipe.teacher)
        found = open_planned(
            cache.location,
            identity,
            data.keys,
            data.numbers,
            examples_per_shard=cache.examples_per_shard,
            skipped=data.unreadable(),
            facts=facts,
            with_others=planning,
            timeout_s=cache.claim_timeout_s,
            patience_s=recipe.parallel.collective_timeout_s,
            is_stopped=lambda: stop.received,
        )
        opened.append(found.writer)
        num_units = len(found.plan.units)
        if num_finished := num_units - len(found.pending):
            tqdm.write(
                f"cache {cache.location}: {num_finished} of {num_units} units are finished, going on with the rest"
            )
        require_few_skipped(
            len(found.plan.skipped) + found.num_skipped,
            max_skipped=recipe.data.max_dropped,
            where=found.writer.folder.where,
        )
        created_by = created_by_versions() | facts
        return Assignment(
            identity, found.plan, found.pending, found.num_skipped, created_by, job=secrets.token_hex(4)
        )

    assignment = world.by_main(plan)
    joined = CacheWriter.join(cache.location, assignment.identity, created_by=assignment.created_by)
    return opened[0] if opened else joined, assignment


class Lead:
    """What the first rank of a copy of the teacher does, or each rank of one that is sharded over all."""

    def __init__(
        self,
        recipe: Recipe,
        processor: ExampleProcessor,
        teacher: Teacher,
        writer: CacheWriter,
        assignment: Assignment,
        world: World,
        stop: StopRequest,
        planning: contextlib.ExitStack,
    ) -> None:
        assert recipe.cache is not None
        assert recipe.teacher is not None
        self.recipe, self.config, self.cache = recipe, recipe.teacher, recipe.cache
        self.processor, self.teacher, self.writer = processor, teacher, writer
        self.assignment, self.world, self.stop, self.planning = assignment, world, stop, planning
        self.source = WindowSource(open_rows(recipe), processor, unseen=recipe.cache.visual_gain)
        self.runner = BatchRunner(self.cache.batch_tokens, may_shrink=not teacher.is_shared)

    def run(self) -> int:
        """Captures while there is something to capture, and commits if no other does; returns the exit status."""
        pending = self.assignment.pending
        with Claims(
            self.writer.folder,
            pending,
            timeout_s=self.cache.claim_timeout_s,
            patience_s=self.recipe.parallel.collective_timeout_s,
            job=self.assignment.job,
            refused_before=self.assignment.num_refused,
        ) as claims:
            self.planning.close()
            refusals = Refusals(
                claims,
                num_unreadable=len(self.assignment.plan.skipped),
                allowed=self.recipe.data.max_dropped,
                num_before=self.assignment.num_refused,
            )
            ranks = self.config.ranks_per_copy if self.teacher.copy_group is not None else 1
            tally = Tally(claims, sum(map(len, pending)), show=self.world.is_main, ranks=ranks)
            with contextlib.closing(tally):
                while True:
                    self.capture_claimed(claims, tally, refusals)
                    tally.rest(self.teacher.seconds())
                    if self.teacher.is_sharded:
                        self.stop.received = self.stop.agreed(self.world)
                    if claims.num_left and self.world.is_main and not self.stop.received:
                        tqdm.write(f"waiting for {claims.num_left} unit(s) that other processes have in hand")
                    if not self.by_one(lambda: claims.wait(self.is_stopped)):
                        break
                    claims.claimant.note(idle=False)
            status = self.by_one(lambda: self.end(claims))
        self.teacher.dismiss_followers(status)
        return status

    def is_stopped(self) -> bool:
        return self.stop.received

    def by_one(self, work: Callable[[], Value]) -> Value:
        """Of a sharded teacher all ranks go on, wait or end together, as the first one says."""
        return self.world.by_main(work) if self.teacher.is_sharded else work()

    def capture_claimed(self, claims: Claims, tally: Tally, refusals: Refusals) -> None:
        """Captures units while one is free."""

        def on_shard(unit: Unit) -> None:
            claims.finish(unit)
            require_space(self.cache.location, unit, num_units_left=claims.num_left)

        assembler = ShardAssembler(self.writer, self.assignment.pending, on_rows=tally.add, on_shard=on_shard)
        lockstep = Lockstep(
            lambda: idle_forward(self.source, self.teacher), is_needed=self.teacher.is_sharded
        )
        with BackgroundWriter(assembler.take, max_pending=MAX_PENDING_BATCHES) as background:
            units = iter(claims.next, None)
            for window in encoded_windows(self.source, units, num_workers=self.cache.num_workers):
                for refused in window.refused:
                    refusals.count(refused.reason)
                    background.put((window.unit_id, refused))
                for batch in captured_batches(
                    window, self.processor, self.teacher, self.runner, self.cache, lockstep
                ):
                    claims.claimant.check()
                    background.put(batch)
                    if self.stop.received:
                        break
                if self.stop.received:
                    break
            lockstep.finish()

    def end(self, claims: Claims) -> int:
        """The exit status, when there is nothing left to capture or a stop was asked for."""
        with contextlib.suppress(WaitStoppedError):
            if claims.is_complete and claims.is_to_commit(self.is_stopped):
                self.commit(claims)
                return 0
        if not claims.is_complete or self.writer.folder.size(PLAN_NAME) is not None:
            return stopped(self.cache, self.writer, self.assignment, self.world, claims)
        if self.world.is_main:
            self.writer.require_committed(self.assignment.plan, settle_s=SETTLE_S)
            tqdm.write(f"cache {self.cache.location} is complete; another process has committed it")
        return 0

    def commit(self, claims: Claims) -> None:
        told = claims.told()
        totals, elapsed_s = totals_of(told), max(facts.get("seconds", 0.0) for facts in told)
        facts = {
            **totals,
            "tensor": self.config.tensor,
            "expert": self.config.expert,
            **environment(),
            **teacher_stamp(self.config),
            "recipe": dump_recipe(self.recipe),
        }
        with self.writer.locked(self.is_stopped):
            # Before the commit: killed after it, the next start would find nothing to do, and nothing to log.
            self.writer.log("captured", seconds=elapsed_s, **facts)
            manifest = self.writer.commit(
                self.assignment.plan, settle_s=SETTLE_S, max_skipped=self.recipe.data.max_dropped
            )
            if self.writer.folder.size(PLAN_NAME) is None:  # else another capture has begun
                remove_claims(self.writer.folder)
        tqdm.write(summary(self.cache, manifest, totals, elapsed_s))


def captured_batches(
    window: EncodedWindow,
    processor: ExampleProcessor,
    teacher: Teacher,
    runner: BatchRunner,
    cache: CacheConfig,
    lockstep: Lockstep,
) -> Iterator[CapturedBatch]:
    """Runs the teacher over a window, batch by batch."""

    def forward(indices: list[int]) -> CapturedBatch:
        encoded = [window.encoded[index] for index in indices]
        names = [window.names[index] for index in indices]
        return capture_batch(
            encoded, window.unit_id, processor, teacher, cache, names=names, join=lockstep.join
        )

    for _, captured in runner.run(lengths_of(window.encoded), forward, names=window.names):
        yield captured


def idle_forward(source: WindowSource, teacher: Teacher) -> None:
    """A forward on behalf of other ranks, over any readable example."""
    teacher.hidden(collated_for(teacher, source.processor, [next(source.usable())]).to(teacher.device))


def collated_for(teacher: Teacher, processor: ExampleProcessor, encoded: Sequence[Encoded]) -> Batch:
    """A batch; for a sharded teacher one with a picture, as those of other ranks may have one.

    The blank's row comes last and has no position.  It is added whatever the others do, so that a unit's targets
    depend on the unit alone.
    """
    is_lacking = teacher.is_sharded and not any(one.has_pictures for one in encoded)
    return processor.collate([*encoded, processor.blank()] if is_lacking else encoded)


def capture_batch(
    encoded: Sequence[Encoded],
    unit_id: str,
    processor: ExampleProcessor,
    teacher: Teacher,
    cache: CacheConfig,
    *,
    names: Sequence[str],
    join: Callable[[], None] = lambda: None,
) -> CapturedBatch:
    """The targets of one batch, on their way to the host.

    join     called before each forward
    Raises   DataError  with the names of the examples for which the teacher gives NaN or infinity
    """

    def collate(encoded: Sequence[Encoded]) -> Batch:
        return collated_for(teacher, processor, encoded).to(teacher.device, non_blocking=True)

    batch = collate(encoded)
    seeds_N = torch.cat([position_seeds(cache.seed, one.key, one.num_positions) for one in encoded])
    join()
    hidden_ND = teacher.hidden(batch)
    chunk_size = teacher.chunk_positions(cache.chunk_size)
    try:
        targets, ce_N = teacher.sparse_targets(
            hidden_ND,
            batch.labels,
            seeds_N.to(teacher.device, non_blocking=True),
            policy=cache.policy,
            temperatures=cache.temperatures,
            chunk_size=chunk_size,
        )
    except DataError as error:
        parts = hidden_ND.split([one.num_positions for one in encoded])
        odd = [
            name
            for name, part_nD in zip(names, parts, strict=True)
            if not teacher.is_sound(part_nD, chunk_size=chunk_size)
        ]
        raise DataError(
            f"the teacher: what it gives for {len(odd)} row(s) is no distribution:\n"
            f"{listed(odd)}\n{error}. Another teacher.dtype may help (float32), or take these rows out"
        ) from error
    gain_N = None
    if cache.visual_gain is not None:
        del batch, hidden_ND  # which the second pass needs the memory of
        if any(one.unseen is not None for one in encoded):
            join()
        gain_N = visual_gain(teacher, collate, encoded, ce_N, chunk_size=chunk_size, names=names)
    return CapturedBatch.of(unit_id, encoded, targets, ce_N, gain_N)


@dataclass
class Refusals:
    """Examples left out, over all that capture and have captured, against the number that may be.

    What one has told is lost when it leaves; what a killed one has told does not count, as it may lie in shards that
    were read.  So the number may be too small, until the commit counts what is there.  It is too large only where two
    have captured the same unit.

    num_unreadable  rows of the plan
    num_before      examples that earlier sessions have left out
    num_found       by this process
    """

    claims: Claims
    num_unreadable: int
    allowed: int
    num_before: int
    num_found: int = 0

    def count(self, reason: str) -> None:
        """Raises   DataError  when one more than allowed is left out"""
        self.num_found += 1
        self.claims.claimant.tell(refused=self.num_found)
        told = [facts for facts in self.claims.told_so_far() if not is_gone(facts)]
        self.num_before = max([self.num_before, *(int(facts.get("refused_before", 0)) for facts in told)])
        number = self.num_unreadable + self.num_before + sum(int(facts.get("refused", 0)) for facts in told)
        if number > self.allowed:
            raise DataError(f"{reason}. That makes {number} left out, data.max_dropped allows {self.allowed}")


def stopped(
    cache: CacheConfig, writer: CacheWriter, assignment: Assignment, world: World, claims: Claims
) -> int:
    """Says how to go on; returns the status of an interrupted capture.

    Units that other ranks still hand in are waited for, so that what is told is what is there.
    """
    if world.is_main:
        if world.size > 1:
            claims.told(job=assignment.job)  # which waits for them
        deadline = time.monotonic() + LAST_WORD_S
        with contextlib.suppress(CacheBusyError), writer.locked(lambda: time.monotonic() >= deadline):
            writer.log("interrupted")
        units = assignment.plan.units
        published = {name.rpartition("/")[2].partition("-")[0] for name in shard_names(writer.folder)}
        num_finished = sum(unit.unit_id in published for unit in units)
        tqdm.write(
            f"stopped: {num_finished} of {len(units)} units of cache {cache.location} are captured and kept. "
            f"To go on: {command_to_go_on(resume=False)}"
        )
    return INTERRUPTED_STATUS


def summary(cache: CacheConfig, manifest: Manifest, totals: dict[str, int], elapsed_s: float) -> str:
    """What was captured now, and what the cache holds in all."""
    held = manifest.totals
    positions = max(held.positions, 1)
    lines = [
        f"cache {cache.location}: captured {totals['examples']} examples, {totals['positions']} positions in "
        f"{elapsed_s:.1f} s ({totals['positions'] / max(elapsed_s, 1e-9):.0f} positions/s)",
        f"  holds {held.examples} examples, {held.positions} positions in {len(manifest.shards)} shard(s), "
        f"{held.bytes / 2**20:.2f} MiB: {held.bytes / positions:.1f} bytes and "
        f"{held.entries / positions:.1f} entries a position",
        f"  {held.truncated} answer(s) cut, {held.skipped} row(s) left out, {held.duplicates} row(s) equal to "
        "an earlier one",
    ]
    lines += [f"  left out: {row.row}: {row.reason}" for row in manifest.skipped[:10]]
    return "\n".join(lines)
