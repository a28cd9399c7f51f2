"""Processes killed at any moment, and started again: nothing that was finished may be lost.

A command is killed once to three times, at a system call of a commit (between write, fsync, rename and unlink) or
after a random time; of several ranks one, or all.  Then it is left to end, and its result is held against one that
nothing has interrupted: a cache byte for byte, a run weight for weight.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.torture.cases import Outcome, Result
from tests.torture.commands import Ended, Running, clear_left_behind, start_ranks
from tests.torture.judging import is_clear_error
from tests.torture.materials import (
    RUN,
    Materials,
    cache_files,
    difference,
    evaluation_of,
    run_content,
    weights_of,
)

EVENTS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
SURVIVOR_LIMIT_S = (
    60.0  # for ranks that are left: one that never joins is missed after twice the recipe's 15 s
)
LIMIT_S = 120.0
AGAIN = {"run": ["--resume"]}


@dataclass(frozen=True)
class Job:
    """A command, what it must come to, and what it must not lose."""

    program: str
    arguments: list[str]
    num_ranks: int
    num_events: int  # about so many, on the first rank
    seconds: float  # about
    fault: Callable[[], str | None]  # of the result
    finished: Callable[[], set[str]]  # work that the next start must not lose


def kill_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    job = JOBS[number % len(JOBS)](things, folder)
    what = f"{job.program} {job.arguments[0]} on {job.num_ranks} rank(s)"
    for attempt in range(chance.randint(1, 3)):
        killed, ended = _killed(job, chance, resume=attempt > 0)
        what += f", {killed}"
        problem = _fault_of_survivors(ended, what)
        if problem is not None:
            return problem
        kept = job.finished()
    ended = _to_the_end(job)
    left = clear_left_behind()
    said = "\n".join(one.said for one in ended)
    if any(one.status is None for one in ended) or left:
        return Result(Outcome.HUNG, f"{what}, then again", said)
    if any(one.status != 0 for one in ended):
        clear = all(is_clear_error(one) for one in ended if one.status != 0)
        return Result(Outcome.LOST if clear else Outcome.WRONG, f"{what}, then refused", said)
    lost = kept - job.finished()
    if lost:
        return Result(Outcome.LOST, f"{what}, then without {', '.join(sorted(lost))}", said)
    fault = job.fault()
    if fault is not None:
        return Result(Outcome.WRONG, f"{what}, then {fault}", said)
    return Result(Outcome.RIGHT, what)


def _killed(job: Job, chance: random.Random, *, resume: bool) -> tuple[str, list[Ended]]:
    """Starts the command and kills it; how, and how the ranks that were left have ended."""
    victim = chance.randrange(job.num_ranks)
    at_event = chance.random() < 0.6
    event = chance.randrange(job.num_events)
    delay_s = chance.uniform(0.0, job.seconds)
    if job.num_ranks > 1 and chance.random() < 0.8:
        delay_s += 0.5  # when all have joined: until then, the others have to wait for their time limit
    whole_group = job.num_ranks == 1 or chance.random() < 0.5
    arguments = [*job.arguments, *(AGAIN.get(job.arguments[0], []) if resume else [])]

    def before(rank: int) -> None:
        if at_event and rank == victim:
            die_at(event)

    running = start_ranks(job.program, arguments, job.num_ranks, before=before)
    deadline = time.monotonic() + (LIMIT_S if at_event else delay_s)
    while not running[victim].is_over() and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in running if whole_group else [running[victim]]:
        if not one.is_over():
            one.kill()
    deadline = time.monotonic() + SURVIVOR_LIMIT_S
    ended = [one.end(deadline_s=deadline) for one in running]
    when = f"call {event}" if at_event else f"{delay_s:.2f} s"
    who = "all" if whole_group else f"rank {victim}"
    return f"{who} killed at {when}", ended


def die_at(event: int) -> None:
    """The process kills itself at that system call, counted over all threads."""
    count = 0

    def killing(function: Callable) -> Callable:
        def called(*args: object, **kwargs: object) -> object:
            nonlocal count
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return called

    for name in EVENTS:
        setattr(os, name, killing(getattr(os, name)))


def _fault_of_survivors(ended: Sequence[Ended], what: str) -> Result | None:
    """Ranks that outlive a killed one end at once, without a traceback; a command may also have been at its end."""
    for one in ended:
        if one.status is None:
            return Result(Outcome.HUNG, f"{what}: a rank went on waiting", one.said)
        if one.status not in (0, -signal.SIGKILL) and not _is_quiet_end(one):
            return Result(Outcome.WRONG, f"{what}: a rank ended with status {one.status}", one.said)
    return None


def _is_quiet_end(ended: Ended) -> bool:
    return ended.status == 8 and "Traceback (most recent call last)" not in ended.said


def _to_the_end(job: Job) -> list[Ended]:
    arguments = [*job.arguments, *AGAIN.get(job.arguments[0], [])]
    running: list[Running] = start_ranks(job.program, arguments, job.num_ranks)
    deadline = time.monotonic() + LIMIT_S
    return [one.end(deadline_s=deadline) for one in running]


# The commands.


def _capture(num_ranks: int, *, num_workers: int = 0) -> Callable[[Materials, Path], Job]:
    def job(things: Materials, folder: Path) -> Job:
        cache = folder / "cache"
        return Job(
            "teacher-cache",
            ["capture", *things.arguments(cache=cache, cache__num_workers=num_workers)],
            num_ranks,
            num_events=36 // num_ranks,
            seconds=1.5 * num_ranks,
            fault=lambda: difference(cache_files(cache), things.whole_cache, what="the cache"),
            finished=lambda: {path.name for path in cache.glob("shards/[0-9a-f]*.arrow")},
        )

    return job


def _growing(things: Materials, folder: Path) -> Job:
    """A cache of some rows that grows; its shards are cut otherwise than in one go, its examples are the same."""
    cache, whole = folder / "cache", folder / "whole"
    for place in (cache, whole):
        _must_end(things, place, limit=4)
    _must_end(things, whole)
    return Job(
        "teacher-cache",
        ["capture", *things.arguments(cache=cache)],
        1,
        num_events=34,
        seconds=1.5,
        fault=lambda: difference(_without_index(cache), _without_index(whole), what="the cache"),
        finished=lambda: {path.name for path in cache.glob("shards/[0-9a-f]*.arrow")},
    )


def _must_end(things: Materials, cache: Path, **data: int) -> None:
    changes = {f"data__{name}": value for name, value in data.items()}
    arguments = ["capture", *things.arguments(cache=cache, **changes)]
    (ended,) = (
        one.end(deadline_s=time.monotonic() + LIMIT_S) for one in start_ranks("teacher-cache", arguments, 1)
    )
    assert ended.status == 0, ended.said


def _without_index(cache: Path) -> dict[str, bytes]:
    """A list and an index of an older manifest may lie beside the newer ones."""
    return {
        name: data for name, data in cache_files(cache).items() if not name.startswith(("index-", "list-"))
    }


def _train(num_ranks: int, **changes: object) -> Callable[[Materials, Path], Job]:
    def job(things: Materials, folder: Path) -> Job:
        runs = folder / "runs"
        run = runs / RUN
        return Job(
            "train-student",
            ["run", *things.arguments(cache=things.cache, runs=runs, **changes)],
            num_ranks,
            num_events=130 // num_ranks,
            seconds=2.5 * num_ranks,
            fault=lambda: difference(run_content(run), things.whole_runs[num_ranks], what="the run"),
            finished=lambda: _newest_checkpoint(run),
        )

    return job


def _newest_checkpoint(run: Path) -> set[str]:
    """Older ones are removed in time."""
    whole = sorted(
        path.name for path in run.glob("checkpoints/step-??????") if (path / "facts.json").exists()
    )
    return {name for name in whole[-1:] if name == "step-000006"}


def _export(things: Materials, folder: Path) -> Job:
    """Over an export that is there, which must stay until the new one is whole."""
    run = folder / RUN
    shutil.copytree(things.finished_run(1), run)
    wanted = weights_of(run / "export")
    return Job(
        "train-student",
        ["export", str(run)],
        1,
        num_events=12,
        seconds=0.4,
        fault=lambda: difference(weights_of(run / "export"), wanted, what="the export"),
        finished=set,
    )


def _evaluate(things: Materials, folder: Path) -> Job:
    run = folder / RUN
    shutil.copytree(things.finished_run(1), run)
    wanted = run_content(run) | evaluation_of(run)
    return Job(
        "train-student",
        ["evaluate", str(run), "--no-references"],
        1,
        num_events=14,
        seconds=2.0,
        fault=lambda: difference(run_content(run) | evaluation_of(run), wanted, what="the evaluation"),
        finished=set,
    )


def _merge(things: Materials, folder: Path) -> Job:
    """Two halves into one."""
    for name, limit in (("one", 4), ("two", None)):
        _must_end(things, folder / name, **({"limit": limit} if limit else {}))
    whole, out = folder / "whole", folder / "out"
    caches = [str(folder / "one"), str(folder / "two")]
    (ended,) = (
        one.end(deadline_s=time.monotonic() + LIMIT_S)
        for one in start_ranks("teacher-cache", ["merge", *caches, str(whole)], 1)
    )
    assert ended.status == 0, ended.said
    return Job(
        "teacher-cache",
        ["merge", *caches, str(out)],
        1,
        num_events=30,
        seconds=0.4,
        fault=lambda: difference(_without_index(out), _without_index(whole), what="the cache"),
        finished=lambda: {path.name for path in out.glob("shards/[0-9a-f]*.arrow")},
    )


JOBS: tuple[Callable[[Materials, Path], Job], ...] = (
    _capture(1),
    _train(1),
    _train(2),
    _capture(2),
    _export,
    _train(1, run__num_workers=1),
    _growing,
    _train(2, run__num_workers=1, run__async_checkpoints=False),
    _evaluate,
    _capture(1, num_workers=1),
    _merge,
    _capture(2, num_workers=1),
)
