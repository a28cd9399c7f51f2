"""Answers, unit by unit, for whichever stage has the model.

    prompts = asked(recipe, processor, config, world)
    write(recipe, config, processor, prompts, author, folder, world, stop)      # an exit status

Every rank, or group of ranks with one copy of the model, claims units from the job's store.  A unit's batches are
made of its prompts alone, whichever are answered already.  So its answers do not depend on how often the job was
stopped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.answering import Answered, Refused, answer, forget_settings, own_ends, sampled
from shared.batching import BatchRunner
from shared.capture.planning import CaptureData, NumberedRows, survey
from shared.capture.windows import EncodedWindow, WindowSource, encoded_windows
from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.data.writable import require_writable
from shared.errors import DataError, RecipeError
from shared.library_output import keep_library_output
from shared.progress import progress
from shared.recipes import Recipe, WriteConfig
from shared.runtime import World
from shared.sparse import position_seeds
from shared.stopping import INTERRUPTED_STATUS, StopRequest, command_to_go_on
from shared.writing.copies import Agreed, Copy, Halt
from shared.writing.files import commit, finish, num_kept
from shared.writing.journal import REFUSED, Entry, Journal, settled
from shared.writing.plan import Plan, SetFolder, Unit, Writer, choice, identity_of, in_steps, units_of

LOG = ".write.log"  # what libraries said
_jobs = itertools.count()  # of this process, and so of all ranks: each has counters of its own
REMEDY = "or lower write.max_new_tokens"


@dataclass(frozen=True, eq=False)
class Author:
    """The model that answers, on its device; ``writer`` says whose answers they are, on the first rank."""

    model: PreTrainedModel
    copy: Copy
    writer: Writer | None


@dataclass(frozen=True, eq=False)
class Assignment:
    """What the first rank tells the others.

    pending      units without a file
    num_kept     answers to their prompts that are there already
    num_refused  prompts of the whole set that could not be asked so far
    """

    plan: Plan
    pending: tuple[Unit, ...]
    num_kept: int
    num_refused: int


def asked(recipe: Recipe, processor: ExampleProcessor, config: WriteConfig, world: World) -> CaptureData:
    """The prompts of the splits that the data set has; called by all ranks, which share the reading.

    Raises   DataError    when more rows cannot be used than ``data.max_dropped`` allows
             RecipeError  when there are no such splits, or no files can hold what is written
    """
    named = {name: getattr(recipe.data.splits, name) for name in config.splits}
    first = {value: name for name, value in reversed(named.items()) if value is not None}
    splits = [name for name in config.splits if name in first.values()]
    if not splits:
        raise RecipeError(f"write.splits {', '.join(config.splits)}: the recipe's data have none of them")
    data = recipe.data.model_copy(update={"written": None})  # a last answer is no part of the prompt
    found = survey(recipe.model_copy(update={"data": data}), processor, world, splits=splits)
    for part in found.keyed:
        require_writable(part.split, part.rows[:1].tolist())
    chosen = found.keyed
    if config.steps is not None:
        steps = config.steps
        chosen = tuple(part.at(in_steps(recipe, steps, len(part.rows))) for part in chosen)
    if config.prompts is not None:
        chosen = tuple(part.at(choice(part.keys, config)) for part in chosen)
    return CaptureData(chosen)


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
    num_tokens = Writing(recipe, config, processor, rows, author, folder, stop).work(assignment, world)
    if stop.agreed(world):
        if world.is_main:
            number = num_kept(folder, assignment.plan)
            again = command_to_go_on(resume=False)
            tqdm.write(f"stopped: {number:,} answers are kept in {folder.path}. To go on: {again}")
        return INTERRUPTED_STATUS
    if world.is_main:
        counts = commit(folder, assignment.plan, prompts)
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
        self.model, self.copy, self.folder, self.stop = author.model, author.copy, folder, stop
        self.store = PrefixStore(f"written {next(_jobs)}", _get_default_store())
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
        self.journals: dict[str, tuple[Unit, Journal]] = {}  # of the units that this rank has claimed

    def work(self, assignment: Assignment, world: World) -> int:
        """Answers units as long as there are any; returns how many tokens all ranks have written."""
        source = WindowSource(self.rows, self.processor, section="write", asks=True)
        units = self.claimed(assignment.pending)
        total = sum(len(unit.keys) for unit in assignment.pending) * self.config.per_prompt
        with progress(
            total=total, initial=assignment.num_kept, desc="answers", unit="ans", disable=not world.is_main
        ) as bar:
            for window in encoded_windows(source, units, num_workers=self.config.num_workers):
                for entries in self.answered(window, assignment.num_refused):
                    if self.is_stopped():
                        break
                    self.keep(window.unit_id, entries)
                    bar.update(assignment.num_kept + self.store.add("answers", 0) - bar.n)
                if self.is_stopped():
                    break
                if self.copy.is_leader:
                    self.finish_if_done(window.unit_id, assignment.plan)
        world.barrier()
        return self.store.add("tokens", 0)

    def claimed(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Units that this rank's copy has claimed from the job's counter, as long as there are any."""
        while (place := self.copy.told(lambda: self.store.add("claimed", 1) - 1)) < len(units):
            unit = units[place]
            self.journals[unit.unit_id] = unit, self.copy.told(lambda: Journal(self.folder.journal(unit)))  # noqa: B023
            yield unit

    def is_stopped(self) -> bool:
        return self.copy.told(lambda: self.stop.received)

    def keep(self, unit_id: str, entries: list[Entry]) -> None:
        """On disk when it returns; of a copy the leader writes."""
        if self.copy.is_leader:
            self.journals[unit_id][1].append(entries)
            self.store.add("tokens", sum(len(one.ids) for one in entries))
            self.store.add("answers", len(entries))

    def finish_if_done(self, unit_id: str, plan: Plan) -> None:
        """Writes the unit's file when there is an entry for each answer, or for a prompt that could not be asked."""
        unit, journal = self.journals[unit_id]
        entries = settled(journal.found, unit.rows.tolist(), per_prompt=self.config.per_prompt)
        if entries is not None and self.folder.told_by(unit, plan) is None:
            finish(self.folder, plan, unit, entries, self.rows, self.processor)
            journal.remove()

    def answered(self, window: EncodedWindow, num_refused: int) -> Iterator[list[Entry]]:
        """What is not in the journal yet, batch by batch."""
        unit, journal = self.journals[window.unit_id]
        number_of = dict(zip(unit.keys, unit.rows.tolist(), strict=True))
        done, draws = journal.done, range(self.config.per_prompt)
        refused = [
            Entry(row, REFUSED, reason=one.reason)
            for one in window.refused
            if ((row := number_of[one.key]), REFUSED) not in done
            and not all((row, draw) in done for draw in draws)
        ]
        if refused:
            self.require_few(refused, num_refused)
            yield refused
        wanted = [(one, number_of[one.key], draw) for one in window.encoded for draw in draws]
        lengths = [len(one.input_ids) + self.max_new_tokens for one, _, _ in wanted]
        names = [name for name in window.names for _ in draws]

        def forward(batch: list[int]) -> list[Entry]:
            some = [wanted[place] for place in batch if wanted[place][1:] not in done]
            answers = self.answers([one for one, _, _ in some], [draw for _, _, draw in some])
            return [
                Entry(row, draw, tuple(said.ids), said.is_whole)
                for (_, row, draw), said in zip(some, answers, strict=True)
            ]

        for _, entries in self.runner.run(lengths, forward, names=names):
            if entries:
                yield entries

    def require_few(self, refused: Sequence[Entry], num_known: int) -> None:
        """Raises   DataError  when more prompts than allowed could not be asked, by all ranks together"""
        number = self.copy.told(lambda: num_known + self.store.add("refused", len(refused)))
        if number > self.max_dropped:
            raise DataError(
                f"{refused[-1].reason}. That makes {number} left out, data.max_dropped allows {self.max_dropped}"
            )

    def answers(self, prompts: Sequence[Encoded], draws: Sequence[int]) -> list[Answered]:
        """Each draw of a prompt has a seed of its own, a function of the recipe's, the row's key and its number.

        Draws are counted through the parts, as a later one may ask a prompt again, of a student that has learned
        from the draws before: with the same noise, its answers were no samples.
        """
        if not prompts:
            return []
        config = self.config
        numbers = [config.part * config.per_prompt + draw for draw in draws]
        seeds = [
            position_seeds(config.seed, one.key, number + 1)[number:]
            for one, number in zip(prompts, numbers, strict=True)
        ]
        halt = Halt(self.copy, self.stop)
        return answer(
            self.model,
            self.processor,
            prompts,
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
            choose=[
                self.refused,
                *sampled(torch.cat(seeds), temperature=config.temperature, top_p=config.top_p),
                *([Agreed(self.copy, self.stop, halt)] if self.copy.is_shared else []),
            ],
            stop=halt,
        )


def _assigned(folder: SetFolder, plan: Plan, num_unreadable: int) -> Assignment:
    """What is left to do, and how many prompts could not be asked so far."""
    folder.files.remove_temporaries(alive_too=True)
    folder.remove_damaged(plan)
    pending, num_kept, num_refused = [], 0, num_unreadable
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        if told is None:
            pending.append(unit)
            found = Journal(folder.journal(unit)).found
            answered = {one.row for one in found if one.draw != REFUSED}
            num_kept += len(found)
            num_refused += sum(one.draw == REFUSED and one.row not in answered for one in found)
        else:
            num_refused += told["counts"]["refused"]
    return Assignment(plan, tuple(pending), num_kept, num_refused)


def _summary(folder: SetFolder, counts: dict[str, int], num_tokens: int, elapsed_s: float) -> str:
    speed = (
        f"{num_tokens:,} tokens now, in {elapsed_s:.1f} s ({num_tokens / max(elapsed_s, 1e-9):,.0f} tokens/s)"
    )
    lines = [
        f"{folder.path}: {counts['answers']:,} answers of {counts['tokens']:,} tokens to {counts['prompts']:,} "
        f"prompts; {speed}",
        f"  {counts['cut']:,} were cut at write.max_new_tokens, {counts['left_out']:,} row(s) or answer(s) left out, "
        f"{counts['equal']:,} row(s) equal to an earlier one",
    ]
    if counts["left_out"]:
        lines.append(f"  left out: see skipped in {folder.path / 'written.json'}")
    return "\n".join(lines)
