"""Many students from one cache: every combination of a grid is a run of its own.

    train-student sweep phantom --grid loss.kd_ratio=0,0.5,1 --grid optimization.learning_rate=1e-3,3e-3 --jobs 2

Each run is an ordinary one, in a process and a folder of its own, so it can be resumed, looked at and exported like
any other; the same command goes on with what is not finished.  A run that fails is reported, the others go on.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import click
import torch

from shared.data.fingerprints import digest
from shared.errors import RecipeError
from shared.recipes import Recipe, load_recipe
from shared.stopping import GO_ON, INTERRUPTED_STATUS, command_to_go_on, stop_on_signals
from shared.threads import share_cores

POLL_S = 0.2
MAX_NAME = 120  # characters; file systems take 255 bytes, and suffixes are to come


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    recipe: str
    overrides: tuple[str, ...]
    plan: Recipe

    @property
    def name(self) -> str:
        return self.plan.run.name

    @property
    def log(self) -> Path:
        return self.plan.run.path.with_suffix(self.plan.run.path.suffix + ".log")

    def command(self) -> list[str]:
        options = [part for item in self.overrides for part in ("--set", item)]
        resume = ["--resume"] if self.plan.run.path.exists() else []
        return [sys.executable, "-m", "stage2_student", "run", self.recipe, *options, *resume]


@dataclass
class Outcome:
    """How the jobs ended, by name; in their order."""

    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        return [name for name, status in self.statuses.items() if status not in (0, INTERRUPTED_STATUS)]

    @property
    def status(self) -> int:
        """Zero where all is done; else the first bad one."""
        return next((status for status in self.statuses.values() if status), 0)


def plan_jobs(recipe: str, overrides: Sequence[str], grid: Sequence[str]) -> list[Job]:
    """Every combination, each validated before any is run.

    Raises   RecipeError  for a grid that is not ``key=value,value``, a key given twice, a recipe that does not fit
    """
    axes: dict[str, list[str]] = {}
    for item in grid:
        key, equals, text = item.partition("=")
        values = _split(text)
        if not equals or not key or not all(values):
            raise RecipeError(f"--grid {item!r}: needs the form section.key=value,value")
        if key in axes:
            raise RecipeError(f"--grid {item!r}: {key} is there already; give all its values at once")
        if len(set(values)) < len(values):
            raise RecipeError(f"--grid {item!r}: a value is there twice")
        axes[key] = values
    if "run.name" in axes:
        raise RecipeError("--grid run.name: each run is named by its settings")
    base = load_recipe(recipe, overrides=tuple(overrides))
    jobs = []
    for combination in itertools.product(*axes.values()):
        settings = [f"{key}={value}" for key, value in zip(axes, combination, strict=True)]
        name = _name(base.run.name, settings)
        own = (*overrides, *settings, f"run.name={name}")
        jobs.append(Job(recipe, own, load_recipe(recipe, overrides=own)))
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise RecipeError(
            "two combinations of the grid would share a run's folder; write their values otherwise"
        )
    return jobs


def sweep(jobs: Sequence[Job], *, num_parallel: int | None = None) -> Outcome:
    """Runs all jobs, at most so many at once; a signal to stop is handed on to those that run, and no more are begun.

    With GPUs, each job sees one of its own; without, all share the cores evenly.

    num_parallel  by default the number of GPUs, or 1 without
    """
    num_parallel = min(num_parallel or max(1, torch.cuda.device_count()), len(jobs))
    outcome = Outcome()
    pending, slots = list(jobs), list(range(num_parallel))
    running: dict[int, _Attempt] = {}

    def end_all() -> None:
        for attempt in running.values():
            attempt.process.kill()

    with stop_on_signals(before_death=end_all) as stop:
        try:
            while running or (pending and not stop.received):
                while pending and slots and not stop.received:
                    job, slot = pending.pop(0), slots.pop(0)
                    click.echo(
                        f"begins  {job.name}, {len(jobs) - len(pending)} of {len(jobs)}; log: {job.log}"
                    )
                    running[slot] = _start(job, slot, num_parallel)
                for slot, attempt in list(running.items()):
                    if stop.received:
                        attempt.tell()
                    status = attempt.status()
                    if status is not None:
                        del running[slot]
                        slots.append(slot)
                        outcome.statuses[attempt.job.name] = status
                        click.echo(attempt.ending(status))
                time.sleep(POLL_S)
        finally:  # empty, unless something went wrong here
            for attempt in running.values():
                attempt.tell()
            for attempt in running.values():
                attempt.process.wait()
    for job in pending:
        outcome.statuses[job.name] = INTERRUPTED_STATUS
    return Outcome({job.name: outcome.statuses[job.name] for job in jobs})


@dataclass
class _Attempt:
    """A job that runs; ``log_begin`` is where its part of the log begins, after those of earlier attempts."""

    job: Job
    process: subprocess.Popen[bytes]
    log_begin: int
    told: bool = False
    begin_s: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        """Hands SIGTERM on, once; a second one would end the run without a checkpoint."""
        if not self.told:
            self.process.terminate()
            self.told = True

    def status(self) -> int | None:
        """None while it runs; as a shell counts it for a death by signal."""
        found = self.process.poll()
        if self.told and found == -signal.SIGTERM:  # it was still importing, and has nothing to save
            return INTERRUPTED_STATUS
        return found if found is None or found >= 0 else 128 - found

    def ending(self, status: int) -> str:
        job = self.job
        if status == 0:
            return f"done    {job.name} in {time.monotonic() - self.begin_s:.0f} s"
        if status == INTERRUPTED_STATUS:
            return f"stopped {job.name}: the same command goes on"
        killed = self.process.returncode < 0
        reason = (
            f"killed by signal {-self.process.returncode}" if killed else f"status {status}, {self._reason()}"
        )
        return f"FAILED  {job.name}: {reason} (all of it: {job.log})"

    def _reason(self) -> str:
        with open(self.job.log, "rb") as log:
            log.seek(self.log_begin)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        last = lines[-1] if lines else "no output"
        return next((line for line in reversed(lines) if "rror" in line), last).strip()[:300]


def _start(job: Job, slot: int, num_parallel: int) -> _Attempt:
    environment = dict(os.environ)
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % num_gpus]
    share_cores(environment, num_parallel)  # spinning threads of one job would take the cores of another
    environment[GO_ON] = command_to_go_on(resume=False)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        log_begin = log.tell()
        process = subprocess.Popen(
            job.command(),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # a terminal's Ctrl-C would be the first signal, and what is handed on the second
        )
        return _Attempt(job, process, log_begin)


def _split(text: str) -> list[str]:
    """At commas that are not inside brackets, so that a value may be a list or a mapping."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()]


def _name(base: str, settings: Sequence[str]) -> str:
    """A run's name: the base's and its settings; of a long one the beginning, and a hash of all settings."""
    name = "-".join([base, *map(_part, settings)])
    if len(name) <= MAX_NAME:
        return name
    mark = digest(list(settings))[:8]
    return f"{name[: MAX_NAME - len(mark) - 1]}-{mark}"


def _part(setting: str) -> str:
    """A setting as part of a folder's name: its value, and its key's last word where that says which key it is."""
    key, _, value = setting.partition("=")
    word = key.rpartition(".")[2]
    return re.sub(r"[^A-Za-z0-9=._+]+", "_", f"{key if word in _shared_words() else word}={value}")


@cache
def _shared_words() -> frozenset[str]:
    """Last words of more than one key, as ``chunk_size``: of the loss and of the cache.

    Of all keys a recipe may have rather than those it has, so that names do not change with its sections.
    """
    sections = Recipe.model_json_schema()["$defs"].values()
    words = Counter(word for section in sections for word in section["properties"])
    return frozenset(word for word, count in words.items() if count > 1)
