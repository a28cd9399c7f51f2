"""The student's step on a CPU: distilling against fine-tuning, side by side in one run.

    python -m tests.benchmarks.bench_training

One small Qwen3.5 student, fed with the same microbatches; the variants take turns, step by step, and every other turn
goes backwards.  Ratios are of steps of one turn, and medians over the turns, in seconds of the processor on one
thread: other processes change them less than seconds of the clock.  Memory: each variant alone in a fresh process,
high-water mark of resident memory while it steps.  The teacher beside it is a larger model of the same family that
runs forward on each microbatch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shared.data.rows import open_split
from shared.kd_loss import KDLoss
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.phantom.dataset import write_dataset
from shared.recipes import LossConfig, Recipe
from shared.recipes.files import validate_tree
from shared.runtime import World, distributed
from shared.small_models import make_small_models
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.training.feed import Microbatch, feed
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.optim import make_optimizer
from stage2_student.training.order import step_shape, training_slots
from stage2_student.training.step import train_step
from stage2_student.training.student import build_student
from tests.benchmarks.bench_loss import in_fresh_process, ratio, status_bytes
from tests.benchmarks.tables import FIGURES, Bench, figure

ROUNDS, NUM_STEPS = 40, 4
FED_STEPS = 60  # over which waiting is measured
MIB = 2**20
SHARPNESS = 12.0  # of the random teacher's logits, so that its entropies are those of a trained one


def make_recipe(folder: Path) -> Recipe:
    """240 drawn questions, a student, a teacher of four times its width, and the teacher's cache."""
    models = {
        "student": {"hidden_size": 96, "num_layers": 4, "vision_hidden_size": 64, "vision_depth": 2},
        "teacher": {"hidden_size": 384, "num_layers": 4, "vision_hidden_size": 128, "vision_depth": 4},
    }
    small = [{"path": str(folder / name), "seed": 1} | sizes for name, sizes in models.items()]
    tree = {
        "bootstrap": {"small_models": {"vocab_size": 2048, "models": small}},
        "data": {"source": str(folder / "data"), "max_answer_tokens": 128},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "cache": {"path": str(folder / "cache"), "num_workers": 0},
        "student": {"model": str(folder / "student"), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 16, "microbatch_size": 8, "max_steps": 1},
        "run": {"name": "bench", "root": str(folder / "runs"), "num_workers": 2},
    }
    return validate_tree(Recipe, tree, origin="recipe of the benchmark")


def prepare(folder: Path) -> None:
    """Data, models and cache on disk."""
    recipe = make_recipe(folder)
    write_dataset(recipe.data.source, pictures={"train": 40, "validation": 8, "test": 8})
    train = open_split(recipe.data, "train")
    assert recipe.bootstrap.small_models is not None
    assert recipe.teacher is not None
    make_small_models(
        recipe.bootstrap.small_models, (text for one in train for text in (one.question, one.answer))
    )
    teacher = load_vlm(recipe.teacher.model, revision=None, dtype=torch.float32, attn_implementation=None)
    with torch.no_grad():
        teacher.model.language_model.norm.weight.fill_(SHARPNESS - 1)  # this norm multiplies by 1 + weight
    teacher.save_pretrained(recipe.teacher.model)
    with distributed(device="cpu") as world:
        capture(recipe, world, StopRequest())


def some_steps(recipe: Recipe, inputs: Inputs, *, num_steps: int, num_workers: int = 0) -> Any:
    shape = step_shape(recipe, inputs.train.num_examples)
    slots = training_slots(
        shape, inputs.train.work(0.0, packed=False), steps=range(num_steps), rank=0, num_ranks=1
    )
    return feed(inputs.training_source(), slots, num_workers=num_workers, pin_memory=False)


def without_targets(microbatch: Microbatch) -> Microbatch:
    return replace(microbatch, targets=None)


class Step:
    """One whole training step of the student, as distilling or as fine-tuning."""

    def __init__(self, recipe: Recipe, inputs: Inputs, world: World) -> None:
        self.recipe, self.inputs, self.world = recipe, inputs, world
        self.student = build_student(recipe, world, num_token_ids=inputs.processor.num_token_ids)
        self.optimizer = make_optimizer(self.student, recipe.optimization)

    def distil(self, microbatches: list[Microbatch]) -> None:
        self._step(microbatches, LossConfig(kd_ratio=0.5))

    def finetune(self, microbatches: list[Microbatch]) -> None:
        self._step([without_targets(one) for one in microbatches], LossConfig(kd_ratio=0.0))

    def _step(self, microbatches: list[Microbatch], loss: LossConfig) -> None:
        self.student.loss = loss
        count = sum(one.num_positions for one in microbatches)
        train_step(
            self.student,
            self.optimizer,
            microbatches,
            self.world,
            num_positions=count,
            num_tokens=sum(one.num_tokens for one in microbatches),
            max_grad_norm=1.0,
        )


def at_work(folder: Path, work: Callable[[Step], Any]) -> Any:
    """``work`` with a student, which is released before the process group ends."""
    recipe = make_recipe(folder)
    with distributed(device="cpu") as world:
        return work(Step(recipe, open_inputs(recipe, world), world))


class LiveTeacher:
    """Runs forward beside the student, and makes the dense loss of its logits."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.teacher is not None
        model = load_vlm(recipe.teacher.model, revision=None, dtype=torch.float32, attn_implementation=None)
        self.body, self.head = split(model)
        self.loss = KDLoss()

    @torch.no_grad()
    def logits(self, microbatch: Microbatch) -> torch.Tensor:
        hidden_BSD = last_hidden_states(self.body, microbatch.inputs)
        return self.head.logits(hidden_BSD.flatten(0, 1)[microbatch.position_index])


def compare_steps(step: Step) -> dict[str, list[float]]:
    """Seconds of each variant's steps, taking turns."""
    steps = [microbatches for microbatches, _ in some_steps(step.recipe, step.inputs, num_steps=NUM_STEPS)]
    teacher = LiveTeacher(step.recipe)

    def with_teacher(microbatches: list[Microbatch]) -> None:
        for one in microbatches:
            logits_NV = teacher.logits(one)
            teacher.loss(torch.zeros_like(logits_NV).requires_grad_(), logits_NV, one.labels).backward()
        step.finetune(microbatches)

    variants = {"distil": step.distil, "finetune": step.finetune, "with_teacher": with_teacher}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 1):
        for name in variants if turn % 2 else reversed(variants):
            begin = time.process_time()
            variants[name](steps[turn % NUM_STEPS])
            seconds[name].append(time.process_time() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def data_wait(step: Step) -> float:
    """The share of time that steps wait for two workers."""
    waited, begin = 0.0, 0.0
    fed = some_steps(step.recipe, step.inputs, num_steps=FED_STEPS, num_workers=2)
    for index, (microbatches, wait_s) in enumerate(fed):
        if index == 0:
            begin = time.perf_counter()  # the workers' start is not a step's wait
        else:
            waited += wait_s
        step.distil(microbatches)
    return waited / (time.perf_counter() - begin)


def peak_bytes(folder: str, variant: str, num_threads: int) -> int:
    """High-water mark of resident memory beyond what was there before: activations, gradients, moments."""
    torch.set_num_threads(num_threads)

    def measure(step: Step) -> int:
        steps = [
            microbatches for microbatches, _ in some_steps(step.recipe, step.inputs, num_steps=NUM_STEPS)
        ]
        run = getattr(step, variant)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        for microbatches in steps:
            run(microbatches)
        return status_bytes("VmHWM") - before

    peak: int = at_work(Path(folder), measure)
    return peak


def rows() -> list[tuple[str, str, str]]:
    """Under ``FIGURES``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        seconds = at_work(folder, compare_steps)
        wait = at_work(folder, data_wait)
        distil, finetune = (in_fresh_process(peak_bytes, scratch, name) for name in ("distil", "finetune"))
    plain_s = seconds["finetune"]
    live = "a step with the teacher live beside the student, against it"
    return [
        figure("a step of 16 examples with `kd_ratio: 0`, time", statistics.median(plain_s), unit=" s"),
        figure("a KD step against it, time", ratio(seconds["distil"], plain_s), most=1.03),
        figure("a KD step against it, peak memory", distil / finetune, most=1.03),
        figure(live, ratio(seconds["with_teacher"], plain_s)),
        figure("data wait with two workers, share of the time", 100 * wait, ".1f", unit=" %", most=2),
    ]


def main() -> None:
    bench = Bench("training")
    notes = f"A small Qwen3.5 student on a CPU, fp32, one thread. Medians of {ROUNDS} turns."
    bench.show("training", "The student's step: distilling against fine-tuning", FIGURES, rows(), notes=notes)


if __name__ == "__main__":
    main()
