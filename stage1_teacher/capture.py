"""Stage one, start to end: what is missing is planned, captured unit by unit, and committed once.

    capture(recipe, world, stop)       called by all ranks; returns an exit status

The first rank reads the data, plans and commits; every rank claims units from the job's store, so that a slow
one does not hold the others up.  A unit's shard depends on the unit alone.  Whatever ends the process, the
next start finds the shards that are finished and does the rest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

from shared.cache import CacheReader, CacheWriter, Identity, Manifest, Plan, Unit
from shared.cache.layout import LIBRARY_LOG_NAME, PLAN_NAME, shard_names
from shared.cache.plan import MAX_PLAN_BYTES
from shared.cache.storage import open_folder
from shared.capture.opening import open_planned
from shared.capture.planning import (
    CaptureData,
    identity_of,
    is_same_capture,
    open_rows,
    survey,
)
from shared.data.collation import Batch, Encoded
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, DataError, RecipeError, TeachonceError, listed
from shared.library_output import keep_library_output
from shared.model_check import check_model, two_examples
from shared.models.quantized import what_becomes_of_it
from shared.models.vlm import load_config
from shared.recipes import CacheConfig, Recipe, TeacherConfig, dump_recipe
from shared.runtime import World, environment
from shared.same_teacher import teacher_content, teacher_stamp
from shared.sparse import position_seeds
from shared.stopping import INTERRUPTED_STATUS, StopRequest, command_to_go_on
from shared.survey import broken_shards, open_processor_of
from stage1_teacher.capturing.batching import BatchRunner
from stage1_teacher.capturing.handover import BackgroundWriter
from stage1_teacher.capturing.lockstep import Lockstep
from stage1_teacher.capturing.progress import Tally, require_space
from stage1_teacher.capturing.shards import CapturedBatch, ShardAssembler
from stage1_teacher.capturing.teacher import Teacher, load_teacher, require_ranks
from stage1_teacher.capturing.windows import EncodedWindow, WindowSource, claimed, encoded_windows, lengths_of

MAX_PENDING_BATCHES = 4  # on their way to disk
SETTLE_S = 60.0  # how long shards of other machines may take to show on a network file system


@dataclass(frozen=True, eq=False)
class Assignment:
    """What the first rank tells the others; ``pending`` are the units without a finished shard."""

    identity: Identity
    plan: Plan
    pending: list[Unit]


def capture(recipe: Recipe, world: World, stop: StopRequest) -> int:
    """Makes the recipe's cache hold all its data; returns the exit status.

    Raises   TeachonceError  of the kind that fits
    """
    if recipe.teacher is None or recipe.cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: a capture needs a teacher and a cache section")
    require_ranks(recipe.teacher, world.size)
    processor = open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
    data = world.by_main(lambda: survey(recipe, processor))
    if world.by_main(lambda: nothing_to_do(recipe, processor, data)):
        if world.is_main:
            remove_committed_plan(recipe.cache.path)
            tqdm.write(f"cache {recipe.cache.path} holds all of the data; nothing to capture")
        return 0
    if world.is_main:
        if num_outvoted := sum(part.num_outvoted for part in data.keyed):
            tqdm.write(f"note: {num_outvoted:,} answer(s) are dropped: not what most of their row say")
        tqdm.write(
            f"teacher {recipe.teacher.model} is run over {len(data.all_keys())} examples; cache {recipe.cache.path}"
        )
        config = load_config(recipe.teacher.model, recipe.teacher.revision)
        is_shared = world.size > 1 and (recipe.teacher.shard or recipe.teacher.ranks_per_copy > 1)
        if (told := what_becomes_of_it(config, dequantize=is_shared)) is not None:
            tqdm.write(f"note: teacher {recipe.teacher.model}: {told}")
    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
    if teacher.is_shared:
        check_teacher(recipe, processor, teacher)
    else:
        world.by_main(lambda: check_teacher(recipe, processor, teacher))
    begin = time.monotonic()
    writer, assignment = open_cache(recipe, processor, data, teacher, world)
    if "://" not in recipe.cache.path:
        keep_library_output(Path(recipe.cache.path) / LIBRARY_LOG_NAME)
    with writer:
        totals = capture_units(recipe, processor, teacher, writer, assignment, world, stop)
        if stop.agreed(world):
            return stopped(recipe.cache, writer, assignment, world)
        if world.is_main:
            elapsed_s = time.monotonic() - begin
            facts = {
                **totals,
                **environment(),
                **teacher_stamp(recipe.teacher),
                "recipe": dump_recipe(recipe),
            }
            shared = {"tensor": recipe.teacher.tensor, "expert": recipe.teacher.expert}
            # Before the commit: killed after it, the next start would find nothing to do, and nothing to log.
            writer.log("captured", seconds=round(elapsed_s, 3), ranks=world.size, **shared, **facts)
            manifest = writer.commit(assignment.plan, settle_s=SETTLE_S if world.size > 1 else 0.0)
            tqdm.write(summary(recipe.cache, manifest, totals, elapsed_s))
    return 0


def nothing_to_do(recipe: Recipe, processor: ExampleProcessor, data: CaptureData) -> bool:
    """Whether a committed cache already is what the recipe asks for; opens no weights."""
    assert recipe.cache is not None
    try:
        reader = CacheReader(recipe.cache.path)
    except (CacheFormatError, FileNotFoundError):
        return False
    skipped = {row.key for row in reader.manifest.skipped if row.key}
    wanted = [key for key in data.all_keys() if key.hex() not in skipped]
    covered = bool(reader.contains(wanted).all())
    if not covered or not is_same_capture(reader, recipe, processor, data):
        return False
    broken = broken_shards(reader, wanted)
    for name in broken:
        tqdm.write(f"cache {recipe.cache.path}: {name} is gone or damaged; its examples are captured again")
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


def remove_committed_plan(location: str) -> None:
    """Removes the plan that a capture killed right after its commit has left: it adds to an older manifest.

    Another capture's plan, which adds to this one, stays.
    """
    folder, identity = open_folder(location), CacheReader(location).manifest.identity
    if folder.size(PLAN_NAME) is None:
        return
    # A cache at work, or one that may not be written, is no worse for it.
    with (
        contextlib.suppress(TeachonceError, OSError),
        CacheWriter.open(location, identity, created_by={}) as writer,
    ):
        plan = Plan.decode(folder.read(PLAN_NAME, max_bytes=MAX_PLAN_BYTES), where=folder.where)
        if writer.manifest is not None and plan.base != writer.manifest.sha256:
            folder.remove(PLAN_NAME)


def open_cache(
    recipe: Recipe, processor: ExampleProcessor, data: CaptureData, teacher: Teacher, world: World
) -> tuple[CacheWriter, Assignment]:
    """The first rank opens the cache and plans; the others join it."""
    assert recipe.cache is not None
    cache = recipe.cache
    opened: list[CacheWriter] = []  # of the first rank; nothing that can be sent to others

    def plan() -> Assignment:
        assert teacher.weights_fingerprint is not None
        identity = identity_of(recipe, processor, data, weights_fingerprint=teacher.weights_fingerprint)
        assert recipe.teacher is not None
        writer, plan, pending = open_planned(
            cache.path,
            identity,
            data.all_keys(),
            data.numbered_keys(),
            examples_per_shard=cache.examples_per_shard,
            skipped=data.unreadable(),
            facts=teacher_content(recipe.teacher) | parallel_facts(recipe.teacher),
        )
        opened.append(writer)
        found = len(plan.units) - len(pending)
        if found:
            tqdm.write(
                f"cache {cache.path}: {found} of {len(plan.units)} units are finished, going on with the rest"
            )
        return Assignment(identity, plan, pending)

    assignment = world.by_main(plan)
    return opened[0] if opened else CacheWriter.join(cache.path, assignment.identity), assignment


def capture_units(
    recipe: Recipe,
    processor: ExampleProcessor,
    teacher: Teacher,
    writer: CacheWriter,
    assignment: Assignment,
    world: World,
    stop: StopRequest,
) -> dict[str, int]:
    """Captures units as long as there are any; returns counts of all ranks."""
    store = PrefixStore("capture", _get_default_store())
    tally = Tally(store, sum(map(len, assignment.pending)), show=world.is_main)
    teacher = teacher.led(world)
    if teacher.is_follower:
        teacher.follow()
    else:
        lead(recipe, processor, teacher, writer, assignment, store, tally, stop)
    tally.add_teacher(teacher.stopwatch.seconds())
    world.barrier()
    return tally.close()


def lead(
    recipe: Recipe,
    processor: ExampleProcessor,
    teacher: Teacher,
    writer: CacheWriter,
    assignment: Assignment,
    store: dist.Store,
    tally: Tally,
    stop: StopRequest,
) -> None:
    """Captures the units that this rank claims, with the ranks that share its copy of the teacher."""
    assert recipe.cache is not None
    cache, units = recipe.cache, assignment.pending

    def on_shard(unit: Unit) -> None:
        require_space(cache.path, unit, num_units_left=len(units) - tally.add_unit())

    assembler = ShardAssembler(writer, units, on_rows=tally.add, on_shard=on_shard)
    runner = BatchRunner(cache.batch_tokens, may_shrink=not teacher.is_shared)
    refusals = Refusals(store, num_known=len(assignment.plan.skipped), allowed=recipe.data.max_dropped)
    mine = claimed(units, lambda: store.add("claimed", 1) - 1)
    source = WindowSource(open_rows(recipe), processor)
    lockstep = Lockstep(lambda: idle_forward(source, teacher), is_needed=teacher.is_sharded)
    with BackgroundWriter(assembler.take, max_pending=MAX_PENDING_BATCHES) as background:
        for window in encoded_windows(source, mine, num_workers=cache.num_workers):
            for refused in window.refused:
                refusals.count(refused.reason)
                background.put((window.unit_id, refused))
            for batch in captured_batches(window, processor, teacher, runner, cache, lockstep):
                background.put(batch)
                if stop.received:
                    break
            if stop.received:
                break
        lockstep.finish()
    teacher.dismiss_followers()


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
        lockstep.join()
        names = [window.names[index] for index in indices]
        return capture_batch(encoded, window.unit_id, processor, teacher, cache, names=names)

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
) -> CapturedBatch:
    """The targets of one batch, on their way to the host.

    Raises   DataError  with the names of the examples for which the teacher gives NaN or infinity
    """
    batch = collated_for(teacher, processor, encoded).to(teacher.device, non_blocking=True)
    seeds_N = torch.cat([position_seeds(cache.seed, one.key, one.num_positions) for one in encoded])
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
    return CapturedBatch.of(unit_id, encoded, targets, ce_N)


@dataclass
class Refusals:
    """Examples left out, over all ranks, against the number that may be."""

    store: dist.Store
    num_known: int
    allowed: int

    def count(self, reason: str) -> None:
        """Raises   DataError  when one more than allowed is left out"""
        number = self.num_known + self.store.add("refused", 1)
        if number > self.allowed:
            raise DataError(f"{reason}. That makes {number} left out, data.max_dropped allows {self.allowed}")


def stopped(cache: CacheConfig, writer: CacheWriter, assignment: Assignment, world: World) -> int:
    """Says how to go on; returns the status of an interrupted capture."""
    if world.is_main:
        writer.log("interrupted")
        units = assignment.plan.units
        published = {name.rpartition("/")[2].partition("-")[0] for name in shard_names(writer.folder)}
        num_finished = sum(unit.unit_id in published for unit in units)
        tqdm.write(
            f"stopped: {num_finished} of {len(units)} units of cache {cache.path} are captured and kept. "
            f"To go on: {command_to_go_on(resume=False)}"
        )
    return INTERRUPTED_STATUS


def summary(cache: CacheConfig, manifest: Manifest, totals: dict[str, int], elapsed_s: float) -> str:
    """What was captured now, and what the cache holds in all."""
    held = manifest.totals
    positions = max(held.positions, 1)
    lines = [
        f"cache {cache.path}: captured {totals['examples']} examples, {totals['positions']} positions in "
        f"{elapsed_s:.1f} s ({totals['positions'] / max(elapsed_s, 1e-9):.0f} positions/s)",
        f"  holds {held.examples} examples, {held.positions} positions in {len(manifest.shards)} shard(s), "
        f"{held.bytes / 2**20:.2f} MiB: {held.bytes / positions:.1f} bytes and "
        f"{held.entries / positions:.1f} entries a position",
        f"  {held.truncated} answer(s) cut, {held.skipped} row(s) left out, {held.duplicates} row(s) equal to "
        "an earlier one",
    ]
    lines += [f"  left out: {row.row}: {row.reason}" for row in manifest.skipped[:10]]
    return "\n".join(lines)
