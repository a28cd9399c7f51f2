"""Answers, unit by unit, for whichever stage has the model.

    prompts = asked(recipe, processor, config, world)
    write(recipe, config, processor, prompts, author, folder, world, stop)      # an exit status

Every rank, or group of ranks with one copy of the model, claims units from the job's store.  A unit's batches are
made of its prompts alone, whichever are answered already.  So its answers do not depend on how often the job was
stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.answering import Answered, Refused, answer, forget_settings, own_ends, sampled
from shared.batching import BatchRunner, claimed
from shared.capture.planning import CaptureData, NumberedRows, survey
from shared.capture.windows import EncodedWindow, WindowSource, encoded_windows
from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.errors import DataError, RecipeError
from shared.library_output import keep_library_output
from shared.progress import progress
from shared.recipes import Recipe, WriteConfig
from shared.runtime import World
from shared.sparse import position_seeds
from shared.stopping import INTERRUPTED_STATUS, StopRequest, command_to_go_on
from shared.writing.copies import Agreed, Copy, Halt
from shared.writing.journal import REFUSED, Entry, Journal
from shared.writing.plan import Plan, SetFolder, Unit, Writer, identity_of, units_of
from shared.writing.tables import encoded, record, require_columns, schema_of

LOG = ".write.log"  # what libraries said
REMEDY = "or lower write.max_new_tokens"


@dataclass(frozen=True, eq=False)
class Author:
    """The model that answers, on its device; ``writer`` says whose answers they are, on the first rank."""

    model: PreTrainedModel
    copy: Copy
    writer: Writer | None


@dataclass(frozen=True, eq=False)
class Assignment:
    """What the first rank tells the others; ``num_refused`` prompts could not be asked so far."""

    plan: Plan
    pending: tuple[Unit, ...]
    num_refused: int


def asked(recipe: Recipe, processor: ExampleProcessor, config: WriteConfig, world: World) -> CaptureData:
    """The prompts of the splits that the data set has; called by all ranks, which share the reading.

    Raises   DataError    when more rows cannot be used than ``data.max_dropped`` allows
             RecipeError  when there are no such splits, or no columns for what is written
    """
    named = {name: getattr(recipe.data.splits, name) for name in config.splits}
    first = {value: name for name, value in reversed(named.items()) if value is not None}
    splits = [name for name in config.splits if name in first.values()]
    if not splits:
        raise RecipeError(f"write.splits {', '.join(config.splits)}: the recipe's data have none of them")
    if odd := [named[name] for name in splits if "/" in named[name]]:
        raise RecipeError(f"split {odd[0]!r}: its name cannot be a file's; answers are in files of that name")
    found = survey(recipe, processor, world, splits=splits)
    require_columns(found.keyed[0].split)
    return found


def write(
    recipe: Recipe,
    config: WriteConfig,
    processor: ExampleProcessor,
    prompts: CaptureData,
    author: Author,
    folder: SetFolder,
    world: World,
    stop: StopRequest,
) -> int:
    """Makes the folder hold an answer to each prompt; returns the exit status.  Called by all ranks.

    Raises   TeachonceError  of the kind that fits
    """
    begin_s = time.monotonic()

    def plan() -> Assignment | None:
        assert author.writer is not None
        identity = identity_of(config, recipe.data, processor, prompts, author.writer)
        plan = folder.planned(identity, units_of(prompts, config.prompts_per_file))
        return None if folder.is_whole(plan) else _assigned(folder, plan, len(prompts.unreadable()))

    assignment = world.by_main(plan)
    keep_library_output(folder.path / LOG)
    if assignment is None:
        if world.is_main:
            tqdm.write(f"{folder.path} holds all answers; nothing to write")
        return 0
    rows = NumberedRows(tuple(part.split for part in prompts.keyed))
    num_tokens = Writing(recipe, config, processor, rows, author, folder, stop).units(assignment, world)
    if stop.agreed(world):
        if world.is_main:
            _tell_stopped(folder, assignment.plan)
        return INTERRUPTED_STATUS
    if world.is_main:
        counts = _commit(folder, assignment.plan, prompts)
        tqdm.write(_summary(folder, counts, num_tokens, time.monotonic() - begin_s))
    return 0


class Writing:
    """One rank's part of the work."""

    def __init__(
        self,
        recipe: Recipe,
        config: WriteConfig,
        processor: ExampleProcessor,
        rows: NumberedRows,
        author: Author,
        folder: SetFolder,
        stop: StopRequest,
    ) -> None:
        self.config, self.processor, self.rows = config, processor, rows
        self.author, self.folder, self.stop = author, folder, stop
        self.max_dropped = recipe.data.max_dropped
        self.max_new_tokens = config.max_new_tokens or recipe.data.max_answer_tokens
        self.ends = own_ends(author.model, processor)
        forget_settings(author.model)
        self.refused = Refused(
            processor.written.refused - set(self.ends), num_token_ids=processor.num_token_ids
        )
        self.runner = BatchRunner(
            config.batch_tokens,
            may_shrink=not author.copy.is_shared,
            setting="write.batch_tokens",
            remedy=REMEDY,
        )

    def units(self, assignment: Assignment, world: World) -> int:
        """Answers units as long as there are any; returns how many tokens all ranks have written."""
        store = PrefixStore("written", _get_default_store())
        copy, pending = self.author.copy, assignment.pending
        journals: dict[str, Journal] = {}

        def claim() -> int:
            place = copy.told(lambda: store.add("claimed", 1) - 1)
            if place < len(pending):
                journals[pending[place].unit_id] = copy.told(
                    lambda: Journal(self.folder.journal(pending[place]))
                )
            return place

        source = WindowSource(self.rows, self.processor, section="write", asks=True)
        mine, finished = list[Unit](), set[str]()
        num_prompts = sum(len(unit.keys) for unit in pending)
        total = num_prompts * self.config.per_prompt
        with progress(total=total, desc="answers", unit="ans", disable=not world.is_main) as bar:
            for window in encoded_windows(
                source, _kept(claimed(pending, claim), mine), num_workers=self.config.num_workers
            ):
                while mine[0].unit_id != window.unit_id:
                    mine.pop(0)
                journal = journals[window.unit_id]
                for entries in self._answered(window, journal, mine[0], store, assignment.num_refused):
                    if copy.told(lambda: self.stop.received):
                        break
                    if copy.is_leader:
                        journal.append(entries)
                        store.add("tokens", sum(len(one.ids) for one in entries))
                        store.add("answers", len(entries))
                    bar.update(store.add("answers", 0) - bar.n)
                if copy.told(lambda: self.stop.received):
                    break
                if self._is_done(mine[0], journal) and copy.is_leader and window.unit_id not in finished:
                    self._finish(mine[0], journal, assignment.plan)
                    finished.add(window.unit_id)
        world.barrier()
        return store.add("tokens", 0)

    def _is_done(self, unit: Unit, journal: Journal) -> bool:
        """Whether there is an entry for each answer, or one for a prompt that could not be asked."""
        num_refused = sum(one.draw == REFUSED for one in journal.found)
        wanted = (len(unit.keys) - num_refused) * self.config.per_prompt + num_refused
        return len(journal.done) == wanted

    def _answered(
        self, window: EncodedWindow, journal: Journal, unit: Unit, store: Store, num_refused: int
    ) -> Iterator[list[Entry]]:
        """What is not in the journal yet, batch by batch."""
        number_of = dict(zip(unit.keys, unit.rows.tolist(), strict=True))
        done = journal.done
        new = [one for one in window.refused if (number_of[one.key], REFUSED) not in done]
        for one in new:
            if self.author.copy.is_leader:
                number = num_refused + store.add("refused", 1)
                if number > self.max_dropped:
                    raise DataError(
                        f"{one.reason}. That makes {number} left out, data.max_dropped allows {self.max_dropped}"
                    )
        if new:
            yield [Entry(number_of[one.key], REFUSED, reason=one.reason) for one in new]
        draws = range(self.config.per_prompt)
        wanted = [(one, number_of[one.key], draw) for one in window.encoded for draw in draws]
        lengths = [len(one.input_ids) + self.max_new_tokens for one, _, _ in wanted]
        names = [name for name in window.names for _ in draws]

        def forward(batch: list[int]) -> list[Entry]:
            some = [wanted[place] for place in batch if wanted[place][1:] not in done]
            answers = self._answers([one for one, _, _ in some], [draw for _, _, draw in some])
            return [
                Entry(row, draw, tuple(said.ids), said.is_whole)
                for (_, row, draw), said in zip(some, answers, strict=True)
            ]

        for _, entries in self.runner.run(lengths, forward, names=names):
            if entries:
                yield entries

    def _answers(self, prompts: Sequence[Encoded], draws: Sequence[int]) -> list[Answered]:
        if not prompts:
            return []
        config, copy = self.config, self.author.copy
        seeds_B = torch.cat(
            [
                position_seeds(config.seed, one.key, draw + 1)[draw:]
                for one, draw in zip(prompts, draws, strict=True)
            ]
        )
        halt = Halt(copy, self.stop)
        return answer(
            self.author.model,
            self.processor,
            prompts,
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
            choose=[
                self.refused,
                *sampled(seeds_B, temperature=config.temperature, top_p=config.top_p),
                *([Agreed(copy, self.stop, halt)] if copy.is_shared else []),
            ],
            stop=halt,
        )

    def _finish(self, unit: Unit, journal: Journal, plan: Plan) -> None:
        """The unit's file, from its journal."""
        split, _ = self.rows.find(int(unit.rows[0]))
        entries = sorted(journal.found, key=lambda one: (one.row, one.draw))
        texts = [self.processor.written.text(one.ids) for one in entries]
        usable: list[tuple[Entry, str]] = []
        skipped: list[dict[str, Any]] = []
        for entry, text in zip(entries, texts, strict=True):
            reason = entry.reason or self.processor.written.why_unusable(text)
            if reason is None:
                usable.append((entry, text))
            else:
                row = self.rows.find(entry.row)[1]
                skipped.append({"row": f"{split.name}[{row}]", "draw": max(entry.draw, 0), "reason": reason})
        counts = {
            "prompts": len(unit.keys),
            "refused": sum(one.draw == REFUSED for one in entries),
            "answers": len(usable),
            "cut": sum(not one.is_whole for one, _ in usable),
            "tokens": sum(len(one.ids) for one, _ in usable),
        }
        about = {"plan": plan.digest, "written_by": plan.written_by, "counts": counts, "skipped": skipped}
        records = self._records(unit, split, usable, plan.written_by)
        self.folder.files.publish(unit.file, encoded(schema_of(split), records, about))
        journal.remove()

    def _records(
        self, unit: Unit, split: VqaSplit, usable: Sequence[tuple[Entry, str]], written_by: str
    ) -> Iterator[dict[str, Any]]:
        """Raises   DataError  when a row is not what was asked any more"""
        key_of = dict(zip(unit.rows.tolist(), unit.keys, strict=True))
        for entry, text in usable:
            _, row = self.rows.find(entry.row)
            example = split[row]
            if self.processor.key(example) != key_of[entry.row]:
                raise DataError(f"{split.where(row)}: changed since it was first read; start again")
            yield record(split, example, text, entry.ids, is_whole=entry.is_whole) | {
                str(split.settings.columns.written_by): written_by,
                "source_key": key_of[entry.row].hex(),
                "source_row": row,
                "draw": entry.draw,
            }


def _kept(units: Iterator[Unit], mine: list[Unit]) -> Iterator[Unit]:
    """The same, each put down as well: the loader asks for units ahead of the answers."""
    for unit in units:
        mine.append(unit)
        yield unit


def _assigned(folder: SetFolder, plan: Plan, num_unreadable: int) -> Assignment:
    """What is left to do, and how many prompts could not be asked so far."""
    folder.files.remove_temporaries(alive_too=True)
    pending, num_refused = [], num_unreadable
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        if told is None:
            pending.append(unit)
            num_refused += sum(one.draw == REFUSED for one in Journal(folder.journal(unit)).found)
        else:
            num_refused += told["counts"]["refused"]
    return Assignment(plan, tuple(pending), num_refused)


def _tell_stopped(folder: SetFolder, plan: Plan) -> None:
    num_done = 0
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        num_done += len(Journal(folder.journal(unit)).found) if told is None else told["counts"]["answers"]
    tqdm.write(
        f"stopped: {num_done} answers are kept in {folder.path}. To go on: {command_to_go_on(resume=False)}"
    )


def _commit(folder: SetFolder, plan: Plan, prompts: CaptureData) -> dict[str, int]:
    """Writes down that the set is whole; returns what is in it."""
    counts: dict[str, int] = {}
    skipped = [{"row": one.row, "reason": one.reason} for one in prompts.unreadable()]
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        if told is None:
            raise DataError(
                f"{folder.path / unit.file}: it was written, and is gone. Run the same command again"
            )
        skipped += told["skipped"]
        counts = {name: counts.get(name, 0) + number for name, number in told["counts"].items()}
    counts["left_out"] = len(skipped)
    folder.commit(plan, counts, skipped)
    return counts


def _summary(folder: SetFolder, counts: dict[str, int], num_tokens: int, elapsed_s: float) -> str:
    speed = (
        f"{num_tokens:,} tokens now, in {elapsed_s:.1f} s ({num_tokens / max(elapsed_s, 1e-9):,.0f} tokens/s)"
    )
    lines = [
        f"{folder.path}: {counts['answers']:,} answers of {counts['tokens']:,} tokens to {counts['prompts']:,} "
        f"prompts; {speed}",
        f"  {counts['cut']:,} were cut at write.max_new_tokens, {counts['left_out']:,} row(s) or answer(s) left out",
    ]
    if counts["left_out"]:
        lines.append(f"  left out: see skipped in {Path(folder.path) / 'written.json'}")
    return "\n".join(lines)
