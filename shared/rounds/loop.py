"""The commands of the rounds, one after the other.  Each is an ordinary one, and printed before it runs.

    status = go_through(rounds, command, covers)

What is there is not made again, so a killed round goes on where it was.  Student and teacher are never in one
process: they meet only through the sets of answers and the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import click

from shared.data.rows import open_split
from shared.data.writable import require_writable
from shared.data.written import WRITTEN
from shared.finished import run_is_finished
from shared.recipes import Recipe
from shared.regular_files import read_regular
from shared.rounds.plan import Round, Rounds, keep, require_as_begun, require_asked_alike
from shared.rounds.students import require_not_gone, require_same_student
from shared.vouched import opened


class Command(Protocol):
    """Runs a command of a stage and returns its exit status."""

    def __call__(self, module: str, verb: str, about: str, arguments: Sequence[str], *, what: str) -> int: ...


def require_possible(recipe: Recipe) -> None:
    """What else would be found when round 0 is over; opens the data, where no command of ours makes them first.

    Raises   RecipeError      when no files can hold what its students would write
             CheckpointError  when round 0 was removed, and what it wrote is there
    """
    first = Rounds(recipe, num_rows=0).of(0)
    require_not_gone(first)
    if recipe.bootstrap.phantom is None:
        for split in ("train", "validation") if first.rounds.measures else ("train",):
            require_writable(open_split(recipe.data, split))


def go_through(rounds: Rounds, command: Command, covers: Callable[[Recipe], bool]) -> int:
    """Makes all rounds after round 0, which is finished; returns the first bad exit status.

    covers   whether a committed cache holds all of a recipe's data
    Raises   RecipeError      when a round was begun with other settings, or its student was asked other held-out
                              prompts than one that is still to be asked
             CheckpointError  when a run was trained anew since its student wrote
    """
    for one in rounds.all:
        require_as_begun(one)
    if rounds.measures and not all(one.losses.exists() for one in rounds.all):
        for one in rounds.all:
            require_asked_alike(one)
    keep(rounds.of(0).training.of_a_run(), rounds.of(0).train)
    for one in rounds.all:
        status = 0 if one.number == 0 else _train(one, command, covers)
        if status:
            return status
        require_same_student(one)
        status = measure(one, command, covers) if rounds.measures else 0
        if status:
            return status
    return 0


def _train(one: Round, command: Command, covers: Callable[[Recipe], bool]) -> int:
    """The student before writes, the teacher is captured on that, and the round's student trains."""
    training, status = keep(one.training, one.train), 0
    if one.rounds.num_prompts:
        writing = keep(one.writing, one.folder / "write.yaml")
        if run_is_finished(one.training):
            return 0
        status = _write(
            one.before.run, writing, one.answers, command, f"round {one.number}: the student writes"
        )
        if not status and not covers(one.training):
            what = f"Round {one.number}: the teacher's targets along the student's answers go into the cache"
            status = command("stage1_teacher", "capture", str(training), (), what=what)
    elif run_is_finished(one.training):
        return 0
    if status:
        return status
    resume = ["--resume"] if one.run.exists() else []
    what = (
        f"Round {one.number}: the student trains on given answers and {one.rounds.num_prompts:,} of its own"
    )
    if one.rounds.config.earlier == "keep" and one.number > 1:
        what = f"Round {one.number}: the student trains on given answers and its own of {one.number} rounds"
    return command("stage2_student", "run", str(training), resume, what=what)


def measure(one: Round, command: Command, covers: Callable[[Recipe], bool]) -> int:
    """CE and KL along what the round's student says to held-out prompts."""
    if one.losses.exists():
        return 0
    writing = keep(one.greedy_writing, one.greedy_write)
    status = _write(
        one.run, writing, one.greedy, command, f"round {one.number}: the student answers held-out prompts"
    )
    if status:
        return status
    if not _num_answers(one.greedy):
        click.echo(f"note: round {one.number}: no held-out answer shows anything; there is no KL along them")
        return 0
    measuring = str(keep(one.measuring, one.folder / "greedy.yaml"))
    if not covers(one.measuring):
        what = f"Round {one.number}: the teacher's targets along these answers, in a cache of their own"
        status = command("stage1_teacher", "capture", measuring, (), what=what)
    options = ["--recipe", measuring, "--no-answers", "--no-references", "--out", str(one.losses)]
    what = f"Round {one.number}: CE and KL along the student's own answers"
    return status or command("stage2_student", "evaluate", str(one.run / "export"), options, what=what)


def _write(run: Path, recipe: Path, out: Path, command: Command, what: str) -> int:
    if (out / WRITTEN).exists():
        return 0
    options = ["--recipe", str(recipe), "--out", str(out)]
    return command("stage2_student", "write", str(run), options, what=what[0].upper() + what[1:])


def _num_answers(folder: Path) -> int:
    told = opened(json.loads(read_regular(folder / WRITTEN)))
    return int(told["counts"]["answers"])
