"""The same student taught in many ways: labels alone, a live teacher, caches of several policies and sizes.

    python -m tests.benchmarks.bench_students [--recipes phantom medpix_sample] [--seeds 0 1 2]

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
from collections.abc import Callable, Iterable, Iterator
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
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.recipes import LossConfig, Recipe, load_recipe
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.runtime import World, distributed
from shared.sparse import position_seeds
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
from tests.benchmarks.student_results import FOLDER, LABELS, LENGTHS, LIVE, TIMED, Results, done, keep

TAUS = (512, 2048, 64, 16)  # the default first
TIMED_STEPS = 70
SIZE_SAMPLE = 48  # examples by which equal sizes are found


@dataclass(frozen=True)
class Job:
    """One run; ``policy`` is None for variants without a cache; the ``key`` of labels alone has kd_ratio 0."""

    recipe: str
    variant: str
    length: str
    seed: int
    kd_ratio: float
    policy: Policy | None

    @property
    def key(self) -> list[Any]:
        kd_ratio = 0.0 if self.variant == LABELS else self.kd_ratio
        return [self.recipe, self.variant, self.length, self.seed, kd_ratio]

    def load(self) -> Recipe:
        """The recipe of this run; without a cache it is that of plain fine-tuning, whatever is done with it."""
        recipe = load_recipe(self.recipe)
        sizes = LENGTHS[self.length.removesuffix(", timed")]
        assert recipe.cache is not None
        kd_ratio = self.kd_ratio if self.policy is not None else 0.0
        return recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"limit": sizes["limit"]}),
                "cache": recipe.cache.model_copy(update=self._cache()),
                "loss": recipe.loss.model_copy(update={"kd_ratio": kd_ratio}),
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
        name = self.variant.replace("/", "_").replace(" ", "_")
        path = FOLDER / "caches" / f"{self.recipe}-{name}-{seed}"
        return {"path": str(path), "policy": self.policy, "seed": seed, "num_workers": 0}


# --- preparing -------------------------------------------------------------------------------------------


def prepare(name: str) -> Recipe:
    """Data, models, a trained teacher and its default cache, all as ``make teacher-cache`` makes them."""
    command = [sys.executable, "-m", "shared.pipeline", "teacher-cache", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_recipe(name)


def policies_of_equal_size(recipe: Recipe, world: World) -> dict[str, Policy]:
    """The default, other sizes, and the other policies at the bytes a position of the default and of 1/64."""
    processor = open_processor(recipe.student.model, recipe.data)
    assert recipe.teacher is not None
    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
    rows = open_inputs(recipe, world).train
    step = max(1, rows.num_examples // SIZE_SAMPLE)
    encoded = [processor.encode(rows.split[int(row)]) for row in rows.rows[::step]]
    hidden = [teacher.hidden(processor.collate([one])) for one in encoded]
    labels = [processor.collate([one]).labels for one in encoded]
    seeds = [position_seeds(0, one.key, one.num_positions) for one in encoded]

    def num_bytes(policy: Policy) -> int:
        with torch.inference_mode():
            made = [
                teacher.sparse_targets(h, y, s, policy=policy, temperatures=(1.0,), chunk_size=512)[0]
                for h, y, s in zip(hidden, labels, seeds, strict=True)
            ]
        return sum(len(codec.encode(one)) for one in made)

    found: dict[str, Policy] = {f"tau 1/{tau}": Threshold(tau=1 / tau) for tau in TAUS}
    for tau in (TAUS[0], 64):
        wanted = num_bytes(Threshold(tau=1 / tau))
        k = largest_within(lambda k: num_bytes(TopK(k=k)), wanted, most=teacher.num_token_ids)
        draws = largest_within(lambda draws: num_bytes(Random(draws=draws)), wanted, most=65535)
        found |= {f"top {k}": TopK(k=k), f"random {draws}": Random(draws=draws)}
    return found


def largest_within(size: Callable[[int], int], wanted: int, *, most: int) -> int:
    """The largest number from 1 to ``most`` whose size is at most ``wanted``, 1 if none is; sizes rise with it."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle - 1)
    return low


def held_out_path(name: str) -> Path:
    return FOLDER / f"{name}-held-out.pt"


def save_held_out(recipe: Recipe, name: str, world: World) -> None:
    """The teacher's log-probs (N, V) of each held-out microbatch, in order."""
    inputs = open_inputs(recipe, world)
    assert recipe.teacher is not None
    num_ids = inputs.processor.num_token_ids
    teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)
    with torch.inference_mode():
        logprobs = [teacher.logprobs(teacher.hidden(one)).clone() for one in held_out(inputs)]  # type: ignore[arg-type]
    torch.save(logprobs, held_out_path(name))


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
    num_rows: int,
) -> Forwarded:
    """Eager cross-entropy and dense KD, from logits."""
    body, head = split(self.model)
    hidden_ND = last_hidden_states(body, inputs).flatten(0, 1).index_select(0, index)
    logits_NV = head.logits(hidden_ND)[:, : self.num_token_ids]
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
    """One job, ready to step."""

    def __init__(self, job: Job, world: World) -> None:
        self.recipe, self.world = job.load(), world
        self.inputs = open_inputs(self.recipe, world)
        processor = self.inputs.processor
        encode = lru_cache(maxsize=512)(processor.encode)  # what workers do beside the step elsewhere
        processor.encode = encode  # type: ignore[method-assign]
        num_ids = processor.num_token_ids
        self.student = build_student(self.recipe, world, num_token_ids=num_ids)
        self.student.loss = LossConfig(kd_ratio=self.recipe.loss.kd_ratio)
        self.teach: Callable[[Microbatch], Microbatch] = lambda one: one
        if job.variant == LIVE:
            self.student.loss = LossConfig(kd_ratio=job.kd_ratio)
            self.student.forward = MethodType(dense_forward, self.student)  # type: ignore[method-assign]
            self.teach = LiveTeacher(self.recipe, num_ids, world).teach

    def steps(self) -> Iterator[float]:
        """All steps; yields the processor seconds that each took on the one thread, without the reading of its data.

        Processor time, because several runs may share the machine.
        """
        recipe, student = self.recipe, self.student
        optimizer = make_optimizer(student, recipe.optimization)
        shape = step_shape(recipe, self.inputs.train.num_examples)
        num_steps = total_steps(recipe, shape)
        work = self.inputs.train.work(0.0, packed=False)
        slots = training_slots(shape, work, steps=range(num_steps), rank=0, num_ranks=1)
        fed = feed(self.inputs.training_source(), slots, num_workers=0, pin_memory=False)
        for step, (microbatches, _) in enumerate(fed):
            set_learning_rate(optimizer, learning_rate(recipe.optimization, step=step, num_steps=num_steps))
            seed_step(recipe.run.seed, step=step, data_rank=0)
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
        whole = torch.load(held_out_path(job.recipe), mmap=True)
        measured = measure(trained, training.inputs, whole, training.recipe)
        size = None
        if training.inputs.cache is not None:
            totals = training.inputs.cache.manifest.totals
            size = totals.bytes / totals.positions
    del training, trained
    return measured | {"num_steps": num_steps, "peak_bytes": peak, "bytes_per_position": size}


def time_steps(jobs: list[Job]) -> list[float]:
    """The median ratio of each one's step to the first one's; they take turns, another one first each time.

    A ratio is of steps over the same examples: their answers, and so their times, differ in length.
    """
    torch.set_num_threads(1)
    seconds: list[list[float]] = [[] for _ in jobs]
    with distributed(device="cpu") as world:
        trainings = [Training(job, world).steps() for job in jobs]
        for turn in range(TIMED_STEPS):
            for place in range(len(jobs)):
                number = (turn + place) % len(jobs)
                seconds[number].append(next(trainings[number]))
        del trainings
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
    model: PreTrainedModel, inputs: Inputs, teacher: list[Tensor], recipe: Recipe
) -> dict[str, float | None]:
    """Over the held-out split: KL from the teacher's whole distributions and CE, nats a position; accuracy.

    An answer is right when every token of it is the most likely one, the end of the turn among them: that is
    when greedy decoding gives the reference to the letter.
    """
    assert inputs.validation is not None
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


def run_all(name: str, *, seeds: list[int], kd_ratio: float, lengths: list[str]) -> None:
    """The runs of one recipe that are not done yet, seed by seed, so that variants take turns."""
    recipe = prepare(name)
    with distributed(device="cpu") as world:
        policies = policies_of_equal_size(recipe, world)
        if not held_out_path(name).exists():
            save_held_out(recipe, name, world)
    variants: dict[str, Policy | None] = {LABELS: None, LIVE: None} | policies
    for seed in seeds:
        for length in lengths:
            for variant, policy in variants.items():
                job = Job(name, variant, length, seed, kd_ratio, policy)
                if json.dumps(job.key) in done():
                    continue
                capture_for(job)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(run, (job,))
                keep(job.key, found)
                print(f"  {' | '.join(map(str, job.key))}: KL {found['kl']:.4f}", file=sys.stderr, flush=True)
    jobs = timed_jobs(name, variants, seeds=seeds, kd_ratio=kd_ratio)
    if any(json.dumps(job.key) not in done() for job in jobs):
        for job in jobs:
            capture_for(job)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            ratios = pool.apply(time_steps, (jobs,))
        for job, ratio in zip(jobs, ratios, strict=True):
            keep(job.key, {"step": ratio})


def timed_jobs(
    name: str, variants: dict[str, Policy | None], *, seeds: list[int], kd_ratio: float
) -> list[Job]:
    """With one seed, as a step's time hardly depends on it."""
    return [Job(name, variant, TIMED, seeds[0], kd_ratio, policy) for variant, policy in variants.items()]


def capture_for(job: Job) -> None:
    """The job's cache over all rows, whatever its length; nothing is done where it is there."""
    if job.policy is not None:
        with distributed(device="cpu") as world:
            capture(replace(job, length="1 epoch").load(), world, StopRequest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.recipes:
        if name == "medpix_sample" and not Path(load_recipe(name).data.source).exists():
            print(f"{name}: its records are not here, left out")
            continue
        run_all(name, seeds=arguments.seeds, kd_ratio=arguments.kd_ratio, lengths=arguments.lengths)
        found = Results(name, arguments.kd_ratio)
        print(f"\n{name}, kd_ratio {arguments.kd_ratio}; means over seeds, half their range in brackets\n")
        print("\n".join([*found.table(), "", *found.costs()]))


if __name__ == "__main__":
    main()
