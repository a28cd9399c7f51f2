"""The same student taught in many ways: labels alone, a live teacher, caches of several policies and sizes.

    python -m tests.benchmarks.bench_students [--recipes phantom medpix_sample] [--seeds 0 1 2] [--tails ghost ...]

Every variant has the same student, the same order of examples and the same number of steps; a seed changes the
order and the cache's draws.  Two lengths, of about the same number of steps: one epoch over all rows, and twenty
over the first 240.  ``top_k`` and ``random`` get the largest caches that are not above the default and 1/64 in size.
What counts is measured against the teacher's *whole* distributions on held-out rows.

Every run is a process of its own, on one thread.  Steps are timed apart: all variants take turns in one process, step
by step.  What is done is kept in work/benchmarks/students.jsonl and not done again: delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shared import codec
from shared.data.processing import open_processor
from shared.dealing import Limits
from shared.kd_loss import KDLoss, LossSums
from shared.models.vlm import in_dtype_of, last_hidden_states, load_vlm, split
from shared.recipes import LossConfig, Recipe, load_recipe
from shared.recipes.policies import TAIL_MODES, Policy, Random, Threshold, TopK
from shared.runtime import World, distributed
from shared.sparse import position_seeds, sparsify
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage2_student.training.feed import Microbatch, feed
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.optim import learning_rate, make_optimizer, set_learning_rate
from stage2_student.training.order import pass_slots, step_shape, total_steps, training_slots
from stage2_student.training.step import seed_step, train_step
from stage2_student.training.student import Forwarded, StudentWithLoss, build_student
from tests.benchmarks.bench_loss import status_bytes
from tests.benchmarks.student_results import (
    COSTS,
    FOLDER,
    LABELS,
    LEARNED,
    LENGTHS,
    LIVE,
    RESULTS,
    TIMED,
    Results,
    done,
    keep,
)
from tests.benchmarks.tables import Bench

TAUS = (512, 2048, 64, 16)  # the default first
TIMED_STEPS = 70
SIZE_SAMPLE = 48  # examples by which equal sizes are found


@dataclass(frozen=True)
class Job:
    """One run; ``policy`` is None for variants without a cache; the ``key`` of labels alone has kd_ratio 0.

    recipe    a name, or a file
    folder    where the caches are
    held_out  so many rows of the validation split are measured; None: all
    tail      where the loss puts the mass that top_k leaves out; None: its default
    """

    recipe: str
    variant: str
    length: str
    seed: int
    kd_ratio: float
    policy: Policy | None
    folder: Path = FOLDER
    held_out: int | None = None
    tail: str | None = None

    @property
    def name(self) -> str:
        """Of the recipe."""
        return Path(self.recipe).stem

    @property
    def key(self) -> list[Any]:
        kd_ratio = 0.0 if self.variant == LABELS else self.kd_ratio
        return [self.name, self.variant, self.length, self.seed, kd_ratio]

    def load(self) -> Recipe:
        """The recipe of this run; without a cache it is that of plain fine-tuning, whatever is done with it."""
        recipe = load_recipe(self.recipe)
        sizes = LENGTHS[self.length.removesuffix(", timed")]
        limit = sizes["limit"] or recipe.data.limit
        assert recipe.cache is not None
        loss = {"kd_ratio": self.kd_ratio if self.policy is not None else 0.0, "tail": self.tail}
        return recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"limit": limit}),
                "cache": recipe.cache.model_copy(update=self._cache()),
                "loss": recipe.loss.model_copy(update=loss),
                "optimization": recipe.optimization.model_copy(
                    update={"num_epochs": sizes["num_epochs"], "max_steps": None}
                ),
                "run": recipe.run.model_copy(update={"seed": self.seed, "num_workers": 0}),
            }
        )

    def _cache(self) -> dict[str, Any]:
        if self.policy is None:
            return {}
        seed = self.seed if self.policy.is_sampled else 0  # without a draw all seeds share a cache
        name = self.variant.split(",")[0].replace("/", "_").replace(" ", "_")  # tails share a cache
        path = self.folder / "caches" / f"{self.name}-{name}-{seed}"
        return {"path": str(path), "policy": self.policy, "seed": seed, "num_workers": 0}


# --- preparing -------------------------------------------------------------------------------------------


def prepare(name: str) -> Recipe:
    """Data, models, a trained teacher and its default cache, all as ``make teacher-cache`` makes them."""
    command = [sys.executable, "-m", "shared.pipeline", "teacher-cache", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_recipe(name)


def policies_of_equal_size(
    recipe: Recipe,
    world: World,
    *,
    taus: Sequence[int] = TAUS,
    num_examples: int = SIZE_SAMPLE,
    most: int = 65535,
) -> dict[str, Policy]:
    """Thresholds, and the other policies at the bytes a position of the first of them and of 1/64.

    most  ids or draws a position
    """
    processor = open_processor(recipe.student.model, recipe.data)
    assert recipe.teacher is not None
    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
    rows = open_inputs(recipe, world).train.spread(num_examples)
    encoded = [processor.encode(rows.split[int(row)]) for row in rows.rows]
    with torch.inference_mode():
        logprobs = [teacher.logprobs(teacher.hidden(processor.collate([one]))).clone() for one in encoded]
    seeds = [position_seeds(0, one.key, one.num_positions) for one in encoded]

    def num_bytes(policy: Policy) -> int:
        made = (sparsify(one, policy, seeds=its) for one, its in zip(logprobs, seeds, strict=True))
        return sum(len(codec.encode(one)) for one in made)

    found: dict[str, Policy] = {f"tau 1/{tau}": Threshold(tau=1 / tau) for tau in taus}
    for tau in (taus[0], 64):
        wanted = num_bytes(Threshold(tau=1 / tau))
        k = largest_within(lambda k: num_bytes(TopK(k=k)), wanted, most=min(most, teacher.num_token_ids))
        draws = largest_within(lambda draws: num_bytes(Random(draws=draws)), wanted, most=most)
        found |= {f"top {k}": TopK(k=k), f"random {draws}": Random(draws=draws)}
    return found


def largest_within(size: Callable[[int], int], wanted: int, *, most: int) -> int:
    """The largest number from 1 to ``most`` whose size is at most ``wanted``, 1 if none is; sizes rise with it."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle - 1)
    return low


def held_out_logprobs(recipe: Recipe, inputs: Inputs, world: World) -> Iterator[Tensor]:
    """The teacher's log-probs (N, V) of each held-out microbatch, in order."""
    assert recipe.teacher is not None
    num_ids = inputs.processor.num_token_ids
    teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)
    for one in held_out(inputs):
        yield teacher.logprobs(teacher.hidden(one))  # type: ignore[arg-type]


def held_out(inputs: Inputs) -> Iterable[Microbatch]:
    assert inputs.validation is not None
    work = inputs.validation.work(0.0, packed=False)
    slots = pass_slots(work, limits=Limits(examples=8), rank=0, num_ranks=1)
    source = inputs.validation_source()
    source.cache = None  # whole distributions are compared here
    return (
        source.microbatch(slot, [int(inputs.validation.rows[i]) for i in slot.examples]) for slot in slots
    )


# --- one run ---------------------------------------------------------------------------------------------


class LiveTeacher:
    """Beside the student, as in an online recipe: its forward pass in every step, its whole distribution."""

    def __init__(self, recipe: Recipe, num_ids: int, world: World) -> None:
        assert recipe.teacher is not None
        self.teacher: Teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)

    @torch.no_grad()
    def teach(self, microbatch: Microbatch) -> Microbatch:
        logits_NV = self.teacher.head.logits(self.teacher.hidden(microbatch))  # type: ignore[arg-type]
        return replace(microbatch, targets=logits_NV[:, : self.teacher.num_token_ids].clone())  # type: ignore[arg-type]


def dense_forward(
    self: StudentWithLoss,
    inputs: dict[str, Tensor],
    index: Tensor,
    labels: Tensor,
    teacher_NV: Tensor,
    *others: object,
) -> Forwarded:
    """Eager cross-entropy and dense KD, from logits; what else a microbatch holds is for losses that it has not."""
    body, head = split(self.model)
    hidden_BSD = last_hidden_states(body, in_dtype_of(head, inputs))
    logits_NV = head.logits(hidden_BSD.flatten(0, 1).index_select(0, index))[:, : self.num_token_ids]
    ce = F.cross_entropy(logits_NV.float(), labels, reduction="sum")
    kd = KDLoss()(logits_NV, teacher_NV, labels, num_batch_labels=1)
    loss = (1 - self.loss.kd_ratio) * ce + self.loss.kd_ratio * kd
    sums = LossSums(
        loss,
        ce.detach(),
        kd.detach(),
        torch.zeros(()),
        torch.tensor(len(labels)),
        torch.zeros(()),
        torch.zeros(()),
    )
    return Forwarded(sums, None)


class Training:
    """One job, ready to step.

    beside  a job whose student and optimizer it shares, where times alone are asked for
    """

    def __init__(self, job: Job, world: World, *, beside: Training | None = None) -> None:
        self.recipe, self.world = job.load(), world
        self.inputs = open_inputs(self.recipe, world)
        processor = self.inputs.processor
        encode = lru_cache(maxsize=512)(processor.encode)  # what workers do beside the step elsewhere
        processor.encode = encode  # type: ignore[method-assign]
        num_ids = processor.num_token_ids
        if beside is None:
            self.student = build_student(self.recipe, world, num_token_ids=num_ids)
            self.optimizer = make_optimizer(self.student, self.recipe.optimization)
        else:
            self.student, self.optimizer = beside.student, beside.optimizer
        self.loss = LossConfig(kd_ratio=self.recipe.loss.kd_ratio, tail=self.recipe.loss.tail)
        self.forward = MethodType(StudentWithLoss.forward, self.student)
        self.teach: Callable[[Microbatch], Microbatch] = lambda one: one
        if job.variant == LIVE:
            self.loss = LossConfig(kd_ratio=job.kd_ratio)
            self.forward = MethodType(dense_forward, self.student)
            self.teach = LiveTeacher(self.recipe, num_ids, world).teach

    def steps(self) -> Iterator[float]:
        """All steps; yields the processor seconds that each took on the one thread, without the reading of its data.

        Processor time, because several runs may share the machine.
        """
        recipe, student, optimizer = self.recipe, self.student, self.optimizer
        shape = step_shape(recipe, self.inputs.train.num_examples)
        num_steps = total_steps(recipe, shape)
        work = self.inputs.train.work(0.0, packed=False)
        slots = training_slots(shape, work, steps=range(num_steps), rank=0, num_ranks=1)
        fed = feed(self.inputs.training_source(), slots, num_workers=0, pin_memory=False)
        for step, (microbatches, _) in enumerate(fed):
            set_learning_rate(optimizer, learning_rate(recipe.optimization, step=step, num_steps=num_steps))
            seed_step(recipe.run.seed, step=step, data_rank=0)
            student.loss, student.forward = self.loss, self.forward  # type: ignore[method-assign]
            begin = time.process_time()
            taught = [self.teach(one) for one in microbatches]
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
            yield time.process_time() - begin


def run(job: Job) -> dict[str, Any]:
    """Trains and measures; in a process of its own."""
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        training = Training(job, world)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        num_steps = sum(1 for _ in training.steps())
        peak = status_bytes("VmHWM") - before
        trained = plain_model(training.recipe, training.student)
        recipe, inputs = training.recipe, training.inputs
        del training
        measured = measure(trained, recipe, inputs, world, num_examples=job.held_out)
        size = None
        if inputs.cache is not None:
            totals = inputs.cache.manifest.totals
            size = totals.bytes / totals.positions
    return measured | {"num_steps": num_steps, "peak_bytes": peak, "bytes_per_position": size}


def time_steps(jobs: list[Job], num_turns: int) -> list[float]:
    """The median ratio of each one's step to the first one's; they take turns, another one first each time.

    All train one student: what a step takes hardly depends on what was learned.  A ratio is of steps over the same
    examples: their answers, and so their times, differ in length.
    """
    torch.set_num_threads(1)
    seconds: list[list[float]] = [[] for _ in jobs]
    with distributed(device="cpu") as world:
        first = Training(jobs[0], world)
        others = [Training(job, world, beside=first) for job in jobs[1:]]
        trainings = [training.steps() for training in (first, *others)]
        for turn in range(num_turns):
            for place in range(len(jobs)):
                number = (turn + place) % len(jobs)
                seconds[number].append(next(trainings[number]))
                told = f"  turn {turn}, {jobs[number].variant}: {seconds[number][-1]:.2f} s"
                print(told, file=sys.stderr, flush=True)
        del trainings, first, others
    return [
        statistics.median(one / other for one, other in zip(column, seconds[0], strict=True))
        for column in seconds
    ]


def plain_model(recipe: Recipe, student: StudentWithLoss) -> PreTrainedModel:
    model = load_vlm(recipe.student.model, revision=None, dtype=torch.float32, attn_implementation=None)
    state = student.model.state_dict()
    model.load_state_dict(
        {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state.items()}
    )
    return model.eval()


@torch.inference_mode()
def measure(
    model: PreTrainedModel, recipe: Recipe, inputs: Inputs, world: World, *, num_examples: int | None
) -> dict[str, float | None]:
    """KL from the teacher's whole distributions and CE, nats a position; accuracy: of the held-out split, or so many
    of its rows.

    An answer is right when every token of it is the most likely one, the end of the turn among them: that is
    when greedy decoding gives the reference to the letter.
    """
    assert inputs.validation is not None
    inputs = replace(inputs, validation=inputs.validation.spread(num_examples))
    assert inputs.validation is not None
    teacher = held_out_logprobs(recipe, inputs, world)
    body, head = split(model)
    kl = ce = 0.0
    count, right = 0, []
    for microbatch, teacher_NV in zip(held_out(inputs), teacher, strict=True):
        hidden_BSD = last_hidden_states(body, microbatch.inputs)
        hidden_ND = hidden_BSD.flatten(0, 1)[microbatch.position_index]
        logq_NV = head.logits(hidden_ND)[:, : teacher_NV.shape[1]].float().log_softmax(-1)
        kl += F.kl_div(logq_NV, teacher_NV, reduction="sum", log_target=True).item()
        ce += F.nll_loss(logq_NV, microbatch.labels, reduction="sum").item()
        count += microbatch.num_positions
        example_N = microbatch.position_index // hidden_BSD.shape[1]
        hit_N = logq_NV.argmax(-1) == microbatch.labels
        for place, example in enumerate(microbatch.slot.examples):
            row = inputs.validation.split[int(inputs.validation.rows[example])]
            if len(row.answer.split()) <= recipe.evaluation.short_answer_words:
                right.append(bool(hit_N[example_N == place].all()))
    return {"kl": kl / count, "ce": ce / count, "accuracy": statistics.fmean(right) if right else None}


# --- all runs --------------------------------------------------------------------------------------------


def run_all(
    name: str, *, seeds: list[int], kd_ratio: float, lengths: list[str], tails: list[str] | None
) -> None:
    """The runs of one recipe that are not done yet, seed by seed, so that variants take turns.

    tails  top_k with each of these and nothing else; None: all variants
    """
    recipe = prepare(name)
    with distributed(device="cpu") as world:
        policies = policies_of_equal_size(recipe, world)
    variants: dict[str, Policy | None] = {LABELS: None, LIVE: None} | policies
    jobs = [
        Job(name, variant, length, seed, kd_ratio, policy)
        for seed in seeds
        for length in lengths
        for variant, policy in variants.items()
    ]
    if tails is not None:
        run_missing([one for job in jobs if isinstance(job.policy, TopK) for one in of_tails(job, tails)])
        return
    run_missing(jobs)
    time_missing(timed_jobs(name, variants, seeds=seeds, kd_ratio=kd_ratio))


def of_tails(job: Job, tails: list[str]) -> list[Job]:
    return [replace(job, variant=f"{job.variant}, {tail}", tail=tail) for tail in tails]


def run_missing(jobs: list[Job], results: Path | None = None) -> None:
    """Those without a result, in order, each in a process of its own."""
    for job in jobs:
        if json.dumps(job.key) in done(results):
            continue
        capture_for(job)
        found = in_own_process(run, job)
        keep(job.key, found, results)
        print(f"  {' | '.join(map(str, job.key))}: KL {found['kl']:.4f}", file=sys.stderr, flush=True)


def time_missing(jobs: list[Job], results: Path | None = None, *, num_turns: int = TIMED_STEPS) -> None:
    """All of them anew, where one has no result."""
    if all(json.dumps(job.key) in done(results) for job in jobs):
        return
    for job in jobs:
        capture_for(job)
    for job, ratio in zip(jobs, in_own_process(time_steps, jobs, num_turns), strict=True):
        keep(job.key, {"step": ratio}, results)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def timed_jobs(
    name: str, variants: dict[str, Policy | None], *, seeds: list[int], kd_ratio: float
) -> list[Job]:
    """With one seed, as a step's time hardly depends on it."""
    return [Job(name, variant, TIMED, seeds[0], kd_ratio, policy) for variant, policy in variants.items()]


def capture_for(job: Job) -> None:
    """The job's cache over all rows, whatever its length; nothing is done where it is there."""
    if job.policy is not None:
        in_own_process(_capture, replace(job, length="1 epoch"))


def _capture(job: Job) -> None:
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        capture(job.load(), world, StopRequest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    parser.add_argument(
        "--tails", nargs="+", choices=TAIL_MODES, help="top_k with each of these, nothing else"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    bench = Bench("students", goes_on=RESULTS.exists())
    for name in arguments.recipes:
        if name == "medpix_sample" and not Path(load_recipe(name).data.source).exists():
            print(f"{name}: its records are not here, left out")
            continue
        run_all(
            name,
            seeds=arguments.seeds,
            kd_ratio=arguments.kd_ratio,
            lengths=arguments.lengths,
            tails=arguments.tails,
        )
        found = Results(name, arguments.kd_ratio)
        table = f"students-{name}-{arguments.kd_ratio:g}"
        about = f"`{name}`, `kd_ratio: {arguments.kd_ratio:g}`"
        notes = "Means over seeds, half their range in brackets."
        bench.show(table, f"What students learned, {about}", LEARNED, found.table(), notes=notes)
        bench.show(f"{table}-costs", f"Costs against labels alone, {about}", COSTS, found.costs())


if __name__ == "__main__":
    main()
