"""Students that differ in how they are taught, and in nothing else: trained, measured, and timed in turns.

    failed = run_missing(jobs)      each in a process of its own; what is done is not done again
    failed += time_missing(jobs)    all of them step by step in one process
    require_all(failed)             an error in the end, where some failed

``bench_students``, ``bench_peers`` and ``bench_real_weights`` say which jobs there are.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch

from shared.phantom.dataset import DRAWING_VERSION
from shared.recipes import Recipe, load_recipe
from shared.recipes.policies import Policy
from shared.recipes.schema import Section
from shared.runtime import World, distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.training.feed import feed
from stage2_student.training.inputs import open_inputs
from stage2_student.training.optim import learning_rate, make_optimizer, set_learning_rate
from stage2_student.training.order import step_shape, total_steps, training_slots
from stage2_student.training.step import seed_step, train_step
from stage2_student.training.student import StudentWithLoss, build_student
from tests.benchmarks.bench_loss import resident_bytes, status_bytes
from tests.benchmarks.own_process import in_own_process
from tests.benchmarks.peers.method import Lesson, Method
from tests.benchmarks.peers.store import StoredMethod
from tests.benchmarks.student_measures import measure, plain_model
from tests.benchmarks.student_results import (
    FOLDER,
    LABELS,
    LENGTHS,
    RESULTS,
    append_line,
    done,
    keep,
    read_lines,
)

TIMED_STEPS = 70
SETTINGS = {
    "bootstrap",
    "data",
    "teacher",
    "student",
    "loss",
    "optimization",
}  # sections that figures depend on
PLACES = {"source", "path", "model", "trained_by"}  # settings in them that say where something lies
Teaching = Policy | Method | None
Key = list[Any]  # of a job


@dataclass(frozen=True)
class Job:
    """One run; the ``key`` of labels alone has kd_ratio 0, and ends with ``held_out`` where that is set.

    recipe    a name, or a file
    teaching  the policy of a cache, or another method; None: labels alone
    folder    where the caches are, and what methods store
    held_out  so many rows of the validation split are measured; None: all
    tail      where the loss puts the mass that targets leave out; None: its default
    """

    recipe: str
    variant: str
    length: str
    seed: int
    kd_ratio: float
    teaching: Teaching
    folder: Path = FOLDER
    held_out: int | None = None
    tail: str | None = None

    @property
    def name(self) -> str:
        """Of the recipe."""
        return Path(self.recipe).stem

    @property
    def key(self) -> Key:
        kd_ratio = 0.0 if self.variant == LABELS else self.kd_ratio
        rows = [] if self.held_out is None else [self.held_out]
        return [self.name, self.variant, self.length, self.seed, kd_ratio, *rows]

    @property
    def policy(self) -> Policy | None:
        return self.teaching if isinstance(self.teaching, Section) else None

    @property
    def method(self) -> Method | None:
        return None if isinstance(self.teaching, Section) else self.teaching

    def load(self) -> Recipe:
        """The recipe of this run; without a cache it is that of plain fine-tuning, whatever is done with it."""
        recipe = load_recipe(self.recipe)
        limits = [limit for limit in (self._sizes["limit"], recipe.data.limit) if limit is not None]
        assert recipe.cache is not None
        loss = {"kd_ratio": self.kd_ratio if self.policy is not None else 0.0, "tail": self.tail}
        return recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"limit": min(limits, default=None)}),
                "cache": recipe.cache.model_copy(update=self._cache()),
                "loss": recipe.loss.model_copy(update=loss),
                "optimization": recipe.optimization.model_copy(
                    update={"num_epochs": self._sizes["num_epochs"], "max_steps": None}
                ),
                "run": recipe.run.model_copy(update={"seed": self.seed, "num_workers": 0}),
            }
        )

    @property
    def rows_repeat(self) -> bool:
        """Few of them, over many epochs."""
        return self._sizes["limit"] is not None

    @property
    def _sizes(self) -> dict[str, int | None]:
        return LENGTHS[self.length.removesuffix(", timed")]

    def _cache(self) -> dict[str, Any]:
        if self.policy is None:
            return {}
        seed = self.seed if self.policy.is_sampled else 0  # without a draw all seeds share a cache
        path = self.folder / "caches" / f"{self._files}-{seed}"
        return {"path": str(path), "policy": self.policy, "seed": seed, "num_workers": 0}

    @property
    def store(self) -> Path:
        """The folder of what the method stores."""
        return self.folder / "stores" / self._files

    @property
    def _files(self) -> str:
        """What tails share."""
        return f"{self.name}-{self.variant.split(',')[0].replace('/', '_').replace(' ', '_')}"


class Training:
    """One job, ready to step.

    beside  a job whose student and optimizer it shares, where times alone are asked for
    """

    def __init__(self, job: Job, world: World, *, beside: Training | None = None) -> None:
        self.recipe, self.world = job.load(), world
        self.inputs = open_inputs(self.recipe, world)
        if job.rows_repeat:
            self._encode_once()
        num_ids = self.inputs.processor.num_token_ids
        if beside is None:
            self.student = build_student(self.recipe, world, num_token_ids=num_ids)
            self.optimizer = make_optimizer(self.student, self.recipe.optimization)
        else:
            self.student, self.optimizer = beside.student, beside.optimizer
        self.lesson = Lesson()
        self.loss = self.recipe.loss
        if job.method is not None:
            self.loss = self.loss.model_copy(update={"kd_ratio": job.kd_ratio})
            self.lesson = job.method.open(self.recipe, self.inputs, world, job.store)
        self.forward = MethodType(self.lesson.forward or StudentWithLoss.forward, self.student)

        self.shape = step_shape(self.recipe, self.inputs.train.num_examples)
        self.num_steps = total_steps(self.recipe, self.shape)

    def _encode_once(self) -> None:
        """All rows, before memory is looked at: pixels that are kept are no part of what a step needs."""
        processor, train = self.inputs.processor, self.inputs.train
        encode = lru_cache(maxsize=train.num_examples)(processor.encode)
        processor.encode = encode  # type: ignore[method-assign]
        for row in train.rows:
            encode(train.split[int(row)])

    def steps(self, *, begin: int = 0) -> Iterator[float]:
        """All steps from that one on; yields the processor seconds that each took on the one thread.

        The reading of its data is not counted.
        Processor time, because several runs may share the machine.
        """
        recipe, student, optimizer = self.recipe, self.student, self.optimizer
        shape, num_steps = self.shape, self.num_steps
        work = self.inputs.train.work(0.0, packed=False)
        slots = training_slots(shape, work, steps=range(begin, num_steps), rank=0, num_ranks=1)
        fed = feed(self.inputs.training_source(), slots, num_workers=0, pin_memory=False)
        for step, (microbatches, _) in enumerate(fed, begin):
            set_learning_rate(optimizer, learning_rate(recipe.optimization, step=step, num_steps=num_steps))
            seed_step(recipe.run.seed, step=step, data_rank=0)
            student.loss, student.forward = self.loss, self.forward  # type: ignore[method-assign]
            read = [self.lesson.read(one) for one in microbatches]
            began = time.process_time()
            taught = [self.lesson.teach(one) for one in read]
            count = sum(one.num_positions for one in taught)
            num_tokens = sum(one.num_tokens for one in taught)
            train_step(
                student,
                optimizer,
                taught,
                self.world,
                num_positions=count,
                num_tokens=num_tokens,
                max_grad_norm=1.0,
            )
            yield time.process_time() - began


class Memory:
    """Of this process, from now on."""

    def __init__(self) -> None:
        self._resident, self._mapped = resident_bytes(), status_bytes("RssFile")
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """At most so much more; without pages of mapped files, which the system takes back when it needs memory."""
        return status_bytes("VmHWM") - self._resident - (status_bytes("RssFile") - self._mapped)


def fingerprint(name: str) -> str:
    """Of what the figures of a recipe depend on beside a job's ``key``: its settings, and its teacher's weights.

    Holds    the same wherever data and models lie
    """
    recipe = load_recipe(name)
    assert recipe.teacher is not None
    tree = recipe.model_dump(mode="json", exclude_defaults=True, include=SETTINGS)
    facts = [_without_places(tree), _weights_in(recipe.teacher.model), DRAWING_VERSION]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _without_places(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_places(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _without_places(value) for key, value in tree.items() if key not in PLACES}


def _weights_in(model: str) -> list[str]:
    """Digests of a folder's files of weights; of a model that has none, its name."""
    found = []
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found or [model]


def run(job: Job) -> dict[str, Any]:
    """Trains and measures; in a process of its own."""
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        training = Training(job, world)
        memory = Memory()
        num_steps = sum(1 for _ in training.steps())
        peak = memory.peak_bytes()
        weights = sum(one.nbytes for one in training.student.parameters())
        trained = plain_model(training.recipe, training.student)
        recipe, inputs, lesson = training.recipe, training.inputs, training.lesson
        size, once, held = lesson.bytes_per_position, lesson.once_bytes, lesson.held_bytes
        del training, lesson
        measured = measure(trained, recipe, inputs, world, num_examples=job.held_out)
        if inputs.cache is not None:
            totals = inputs.cache.manifest.totals
            size = totals.bytes / totals.positions
    sizes = {
        "peak_bytes": peak,
        "weights_bytes": weights,
        "held_bytes": held,
        "bytes_per_position": size,
        "once_bytes": once,
    }
    return measured | {"num_steps": num_steps} | sizes


def time_steps(jobs: list[Job], num_turns: int, kept: Path) -> list[list[float]]:
    """Quartiles of the ratio of each one's step to the first one's; they take turns, another one first each time.

    All train one student: what a step takes hardly depends on what was learned.  A ratio is of steps over the same
    examples: their answers, and so their times, differ in length.

    num_turns  at most: an epoch may have fewer steps
    kept       where the seconds of each turn are, and where those of a run before are found
    """
    torch.set_num_threads(1)
    about = {"keys": [job.key for job in jobs], "fingerprint": fingerprint(jobs[0].recipe)}
    turns: list[list[float]] = [one["seconds"] for one in read_lines(kept) if about.items() <= one.items()]
    with distributed(device="cpu") as world:
        first = Training(jobs[0], world)
        others = [Training(job, world, beside=first) for job in jobs[1:]]
        num_turns = min(num_turns, first.num_steps)
        trainings = [training.steps(begin=len(turns)) for training in (first, *others)]
        for turn in range(len(turns), num_turns):
            seconds = [0.0] * len(jobs)
            for place in range(len(jobs)):
                number = (turn + place) % len(jobs)
                seconds[number] = next(trainings[number])
                told = f"  turn {turn}, {jobs[number].variant}: {seconds[number]:.2f} s"
                print(told, file=sys.stderr, flush=True)
            turns.append(seconds)
            append_line(kept, about | {"turn": turn, "seconds": seconds})
        del trainings, first, others
    columns = list(zip(*turns[:num_turns], strict=True))
    return [
        np.percentile(np.divide(column, columns[0]), (25, 50, 75)).tolist()  # of one step all are its own
        for column in columns
    ]


def missing(jobs: list[Job], results: Path | None = None) -> list[Job]:
    """Those without a result of their recipe as it is now."""
    kept = done(results)
    marks = {name: fingerprint(name) for name in {job.recipe for job in jobs}}
    return [job for job in jobs if kept.get(json.dumps(job.key), {}).get("fingerprint") != marks[job.recipe]]


def run_missing(jobs: list[Job], results: Path | None = None) -> list[Key]:
    """Those without a result, in order, each in a process of its own; returns those that failed."""
    failed: list[Key] = []
    for job in missing(jobs, results):
        try:
            capture_for(job)
            found = in_own_process(run, job)
        except Exception:
            traceback.print_exc()
            failed.append(job.key)
            continue
        keep(job.key, found, results, fingerprint=fingerprint(job.recipe))
        print(f"  {' | '.join(map(str, job.key))}: KL {found['kl']:.4f}", file=sys.stderr, flush=True)
    return failed


def time_missing(
    jobs: list[Job], results: Path | None = None, *, num_turns: int = TIMED_STEPS, but: list[Key]
) -> list[Key]:
    """All of them anew, where one has no result; returns those that could not be timed.

    but  runs that failed: their variants are left out
    """
    variants = {variant for _, variant, *_ in but}
    jobs = [job for job in jobs if job.variant not in variants]
    if not missing(jobs, results):
        return []
    if LABELS in variants:
        print(f"  no steps are timed: there is nothing to compare with where {LABELS} fail", file=sys.stderr)
        return [job.key for job in jobs]
    turns = (results or RESULTS).with_suffix(".turns.jsonl")
    try:
        for job in jobs:
            capture_for(job)
        quartiles = in_own_process(time_steps, jobs, num_turns, turns)
    except Exception:
        traceback.print_exc()
        return [job.key for job in jobs]
    for job, (low, middle, high) in zip(jobs, quartiles, strict=True):
        found = {"step": middle, "step_quartiles": [low, high]}
        keep(job.key, found, results, fingerprint=fingerprint(job.recipe))
    turns.unlink()
    return []


def require_all(failed: list[Key]) -> None:
    """Raises   SystemExit  that names those that failed, where there are some"""
    if failed:
        names = "".join(f"\n  - {' | '.join(map(str, key))}" for key in failed)
        raise SystemExit(f"failed; the same command tries them again, and the errors are above:{names}")


def capture_for(job: Job) -> None:
    """The job's cache, or what its method stores, over all rows, whatever its length; once."""
    if isinstance(job.teaching, Section | StoredMethod):
        in_own_process(_capture, replace(job, length="1 epoch"))


def _capture(job: Job) -> None:
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        if isinstance(job.teaching, StoredMethod):
            job.teaching.prepare(job.load(), world, job.store)
        else:
            capture(job.load(), world, StopRequest())
