"""The survey of a split by all ranks, each with its processes, of what no earlier survey has kept."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shared.data.loading import PackedDataset, begin_worker, loaded_items
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.errors import DataError, TeachonceError, TrainingError, is_out_of_memory
from shared.progress import progress
from shared.recipes import Recipe
from shared.runtime import Queue, World, alone
from shared.surveying.found import SCHEMA, look, usable_example, with_written
from shared.surveying.kept import Kept, place_beside
from shared.surveying.parts import Part, parts_of
from shared.threads import num_cores

NUM_CHECKED = 32  # rows that are read again, of all that is kept
FEWEST_CHECKED = 4  # of each rank
READING_THREADS = 16  # that wait for disks


@dataclass(frozen=True)
class Surveyors:
    """Who looks at the rows, and where what they find is kept.

    kept_at          a path or URL; None: nowhere
    num_workers      processes of each rank, at most: it has no more than its share of the machine's cores
    workers_setting  the recipe's key for them
    """

    world: World = field(default_factory=alone)
    kept_at: str | None = None
    num_workers: int = 0
    workers_setting: str = "run.num_workers"

    @classmethod
    def of_capture(cls, recipe: Recipe, world: World | None = None) -> Surveyors:
        """Of a teacher that reads rows, also where it captures nothing."""
        if recipe.cache is None:
            return cls.of_run(recipe, world)
        place = place_beside(recipe.cache.locations[0])
        return cls(world or alone(), place, recipe.cache.num_workers, "cache.num_workers")

    @classmethod
    def of_run(cls, recipe: Recipe, world: World | None = None) -> Surveyors:
        """What is kept lies beside the cache, so that its capture and all of its students share it."""
        beside = str(recipe.run.path) if recipe.cache is None else recipe.cache.locations[0]
        return cls(world or alone(), place_beside(beside), recipe.run.num_workers)

    @property
    def num_processes(self) -> int:
        """That work at once, for each rank."""
        return min(self.num_workers, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def survey_rows(
    split: VqaSplit, processor: ExampleProcessor, surveyors: Surveyors, *, decode: bool, show: bool
) -> pa.Table:
    """A line for each row of the split, as ``found.SCHEMA``; called by all ranks, and the same on all.

    decode   also finds pictures that cannot be decoded
    show     says on the first rank how far it is, and what is worth saying
    Raises   FileError  when a file cannot be read at all, or has changed
             DataError  when written answers are to other prompts than those of their rows
    """
    if split.written is not None:  # what is kept of a data file is that of its own rows
        asked = replace(split, written=None)
        splits = (asked, *split.written.splits)
        tables = [survey_rows(one, processor, surveyors, decode=decode, show=show) for one in splits]
        return with_written(split, split.written, tables)
    world, parts = surveyors.world, parts_of(split)
    source = PartSource(split, processor, Kept.of(surveyors.kept_at, split, processor, decode=decode), decode)
    mine = range(len(parts))[world.rank :: world.size]
    kept: dict[int, pa.RecordBatch] = {}

    def read_kept() -> tuple[list[int], list[str], str | None]:
        kept.update(source.kept(parts, mine))
        number = max(FEWEST_CHECKED, NUM_CHECKED // world.size)
        doubt = source.disagreement([(parts[n], kept[n]) for n in kept], number=number)
        return list(kept), source.damaged, doubt

    known, damaged, doubts = zip(*world.by_all(read_kept), strict=True)
    notes = [f"{one}. Its rows are surveyed again" for some in damaged for one in some]
    if any(doubts):
        kept.clear()
        known = ()
        notes.append(f"{next(filter(None, doubts))}. All rows of the split are surveyed again")
    missing = sorted(set(range(len(parts))).difference(*known))
    queue = world.queue(len(missing))
    is_told = show and world.is_main
    _tell(notes, is_told=is_told)

    def look_at_the_rest() -> tuple[dict[int, pa.RecordBatch], list[str]]:
        """Also what was kept, without the names of pictures' files, which nobody needs any more."""
        unkept = []
        todo = [parts[number] for number in missing]
        for one in looked(source, todo, queue, surveyors, is_shown=is_told):
            kept[missing[one.number]] = one.batch
            unkept += [] if one.unkept is None else [one.unkept]
        return {number: batch.drop_columns(["files"]) for number, batch in kept.items()}, unkept

    found, unkept = zip(*world.by_all(look_at_the_rest), strict=True)
    refusals = [reason for some in unkept for reason in some]
    _tell([f"the survey of the rows is not kept: {reason}" for reason in refusals[:1]], is_told=is_told)
    by_number = {number: batch for some in found for number, batch in some.items()}
    batches = [by_number[number].replace_schema_metadata(None) for number in range(len(parts))]
    return pa.Table.from_batches(batches, schema=SCHEMA.remove(SCHEMA.get_field_index("files")))


def _tell(notes: Sequence[str], *, is_told: bool) -> None:
    for note in notes if is_told else ():
        tqdm.write(f"note: {note}")


@dataclass(frozen=True, eq=False)
class Looked:
    """What was found of a part, and why it is not kept; None where it is, or is not meant to be."""

    number: int
    batch: pa.RecordBatch
    unkept: str | None


class PartSource(Dataset):
    """Looks at the rows of a part and keeps what it finds; in data-loader workers, too."""

    def __init__(self, split: VqaSplit, processor: ExampleProcessor, kept: Kept, decode: bool) -> None:
        self.split, self.processor, self.decode = split, processor, decode
        self._kept = kept

    def __getitem__(self, numbered: tuple[int, Part]) -> Looked | TeachonceError:
        number, part = numbered
        try:
            batch = self._look(part.rows, part)
        except TeachonceError as error:  # as a value: the loader would wrap it in a worker's traceback
            return error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return TrainingError(
                f"{self.split.where(part.first)} and the rows behind it: a data-loader worker has not enough memory "
                "to read them. Lower cache.num_workers and run.num_workers, or give the job more memory"
            )
        return Looked(number, batch, self._kept.write(part, batch))

    @property
    def damaged(self) -> list[str]:
        return self._kept.damaged

    def _look(self, rows: Sequence[int], part: Part) -> pa.RecordBatch:
        before = part.first - part.begin
        return look(self.split, self.processor, rows, decode=self.decode, before=before)

    def kept(self, parts: Sequence[Part], numbers: Sequence[int]) -> dict[int, pa.RecordBatch]:
        """What is kept of the parts of these numbers, and is still so."""
        with ThreadPoolExecutor(READING_THREADS) as threads:
            batches = threads.map(self._kept.read, [parts[number] for number in numbers])
            found = dict(zip(numbers, batches, strict=True))
        read = {number: batch for number, batch in found.items() if batch is not None}
        renewed = {number: self._with_reasons(parts[number], batch) for number, batch in read.items()}
        return {number: batch for number, batch in renewed.items() if batch is not None}

    def _with_reasons(self, part: Part, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """What keeps rows from being used, told anew; None where nothing does any more.

        Such a row may have been mended without a change of the data file, and its number is another one where
        other files have changed.
        """
        lines = np.flatnonzero(batch.column("reason").is_valid().to_numpy(zero_copy_only=False)).tolist()
        if not lines:
            return batch
        reasons: list[str | None] = [None] * batch.num_rows
        for line in lines:
            try:
                usable_example(self.split, self.processor, part.first + line, decode=self.decode)
                return None
            except DataError as error:
                reasons[line] = str(error)
        place = SCHEMA.get_field_index("reason")
        return batch.set_column(place, SCHEMA.field(place), pa.array(reasons, pa.string()))

    def disagreement(self, kept: Sequence[tuple[Part, pa.RecordBatch]], *, number: int) -> str | None:
        """Reads some of the rows again, others at each start; what is not as it was kept, or None."""
        ends = list(accumulate(part.num_rows for part, _ in kept))
        num_rows = ends[-1] if ends else 0
        for place in sorted(random.Random().sample(range(num_rows), min(number, num_rows))):
            part, batch = kept[bisect_right(ends, place)]
            line = place - ends[bisect_right(ends, place)] + part.num_rows
            again, told = self._look([part.first + line], part), batch.slice(line, 1)
            for name in SCHEMA.names:
                if again.column(name).to_pylist() != told.column(name).to_pylist():
                    where = self.split.where(part.first + line)
                    return f"{where}: its {name.replace('_', ' ')} is not what an earlier survey has kept"
        return None


def looked(
    source: PartSource, parts: Sequence[Part], queue: Queue, surveyors: Surveyors, *, is_shown: bool
) -> Iterator[Looked]:
    """What is found of the parts that this rank takes.

    Raises   TeachonceError  as ``survey_rows``; no rank takes another part then
    """
    num_workers = min(surveyors.num_processes, len(parts))
    num_workers = 0 if num_workers < 2 else num_workers  # one would do what this process can do itself
    loader: DataLoader = DataLoader(
        PackedDataset(source, workers_setting=surveyors.workers_setting) if num_workers else source,
        sampler=((number, parts[number]) for number in queue),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        in_order=False,
        worker_init_fn=begin_worker,
    )
    ends = list(accumulate(part.num_rows for part in parts))
    desc = f"reading {source.split.name}"
    with progress(
        total=sum(ends[-1:]), desc=desc, unit="row", disable=not (is_shown and parts), leave=False
    ) as bar:
        try:
            for item in loaded_items(loader, workers_setting=surveyors.workers_setting):
                yield item
                bar.update(ends[min(queue.num_taken(), len(ends)) - 1] - bar.n)
        except TeachonceError:
            queue.give_up()
            raise
