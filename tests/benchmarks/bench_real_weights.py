"""A pretrained teacher with 262,144 ids on real pictures, and its students: ``make bench-real``.

    python -m tests.benchmarks.bench_real_weights [--root work/real] [--rows N] [--only PART ...] [--tiny]

    teacher   Gemma 3 270M behind a small vision tower, fine-tuned on medpix_sample: CE before and after, and CE with
              the pictures of other cases
    targets   the error of the head's gradient by policy, size and tail; its student is the teacher without two layers
    further   the same with the model before fine-tuning as the student, which is further from the teacher
    student   half of its layers, from a cache at the default tau
    students  labels alone, the live teacher, caches of three sizes, top_k (with two tails) and random at equal bytes
    steps     the time of a step of each against that of labels alone

Teacher, cache and first student are made by the ordinary commands.  Weights and moments are fp32, and computation is
in bf16, on one thread.  All of it is kept in the folder, and the same command goes on where it was, also with more
seeds, lengths or parts; with other settings it is refused.  Delete the folder to begin anew.  ``--tiny`` tries
everything in a minute with a small random model and drawn rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from shared.data.processing import open_processor
from shared.models.vlm import load_vlm
from shared.recipes import load_recipe
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.runtime import distributed
from tests.benchmarks import full_shapes
from tests.benchmarks.bench_students import policies_of_equal_size
from tests.benchmarks.bench_targets import FP16, STEP_TAUS, Line, measure, scheme, show_errors, table
from tests.benchmarks.own_process import in_own_process
from tests.benchmarks.peers.live import LiveTeacher
from tests.benchmarks.pretrained_gemma import TINY_VISION, read_package, save_vlm, shorten, tiny_model
from tests.benchmarks.real_teacher import batches, distributions
from tests.benchmarks.student_results import LABELS, LENGTHS, LIVE, TIMED, Results, learned
from tests.benchmarks.student_runs import (
    Job,
    Key,
    Teaching,
    fingerprint,
    require_all,
    run_missing,
    time_missing,
)
from tests.benchmarks.synthetic_teacher import Positions
from tests.benchmarks.tables import Bench, stamp

ROOT = Path(__file__).parents[2]
TAUS = (512, 64, 16)  # the default first
ERROR_TAUS = (16, 32, 64, 128, 512)
ERROR_DRAWS = (50, 100, 200, 400, 800)
ERROR_KS = (8, 32, 64, 128, 256)
NUM_EXAMPLES = 32  # by which equal sizes are found
NUM_DIRECTIONS = 48  # of the hidden states; a sum over 262,144 ids takes 4 bytes times so many


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    rows       of the training split; None: all
    held_out   rows on which students are measured
    positions  of the errors of the head's gradient, at least: whole batches
    """

    root: Path
    tiny: bool
    rows: int | None
    seeds: tuple[int, ...]
    lengths: tuple[str, ...]
    kd_ratio: float
    held_out: int
    positions: int
    num_turns: int

    @property
    def settings(self) -> dict[str, Any]:
        """What must stay as it is while a folder is in use, by the names of the options."""
        return {
            "tiny": self.tiny,
            "rows": self.rows,
            "kd-ratio": self.kd_ratio,
            "held-out": self.held_out,
            "positions": self.positions,
            "turns": self.num_turns,
        }

    def keep(self) -> None:
        """Writes the settings down, or compares them with those that the folder began with.

        Raises   SystemExit  that says what differs
        """
        path, recipes = self.root / "plan.json", [self.recipe(name) for name in ("teacher", "student")]
        if not path.exists():
            if any(recipe.exists() for recipe in recipes):
                raise SystemExit(
                    f"{self.root}: it was begun without a plan.json, so nobody knows with which settings. Delete it, "
                    "or choose another --root"
                )
            path.write_text(json.dumps(self.settings, indent=1) + "\n")
        began = json.loads(path.read_text())
        different = [
            f"--{name} was {began.get(name)}, now it is {value}"
            for name, value in self.settings.items()
            if began.get(name) != value
        ]
        if different:
            raise SystemExit(
                f"{self.root} was begun with other settings: {'; '.join(different)}. Give those again, or choose "
                "another --root"
            )

    @property
    def num_layers(self) -> int:
        return 2 if self.tiny else 9

    @property
    def num_layers_of_near(self) -> int:
        """Of the student of the errors."""
        return 3 if self.tiny else 16

    @property
    def results(self) -> Path:
        return self.root / "students.jsonl"

    def recipe(self, name: str) -> Path:
        return self.root / f"{name}.yaml"

    def write_recipes(self) -> None:
        """Of the teacher and of its student; a folder's own stay as they are."""
        for name, tree in {"teacher": self._teacher(), "student": self._student()}.items():
            if not self.recipe(name).exists():
                self.recipe(name).write_text(yaml.safe_dump(tree, sort_keys=False))

    def _common(self, name: str, model: Path) -> dict[str, Any]:
        source = self.root / "data" if self.tiny else load_recipe("medpix_sample").data.source
        return {
            "data": {"source": str(source), "max_answer_tokens": 128, "limit": self.rows},
            "student": {"model": str(model), "compute_dtype": "bfloat16"},
            "loss": {"kd_ratio": 0.0, "chunk_size": 256},  # of 262,144 logits: 256 MiB
            "optimization": {
                "global_batch_size": 4 if self.tiny else 16,
                "microbatch_tokens": 1024,
                "num_epochs": 1,
                "learning_rate": 1e-4,
                "num_warmup_steps": 5,
            },
            # A copy behind training would take three times the weights once more.
            "run": {
                "name": name,
                "root": str(self.root / "runs"),
                "seed": 0,
                "num_workers": 0,
                "async_checkpoints": False,
                "keep_checkpoints": 1,
            },
        }

    def _teacher(self) -> dict[str, Any]:
        return self._common("teacher", self.root / "base")

    def _student(self) -> dict[str, Any]:
        model = str(self.root / "runs" / "teacher" / "export")
        return self._common("student", self.root / "half") | {
            "teacher": {"model": model, "dtype": "bfloat16"},
            "cache": {
                "path": str(self.root / "caches" / "default"),
                "policy": {"kind": "threshold", "tau": 1 / TAUS[0]},
                "batch_tokens": 2048,
                "num_workers": 0,
            },
            "loss": {"kd_ratio": self.kd_ratio, "chunk_size": 256},
        }


def command(*arguments: object) -> str:
    """The output of one of the ordinary commands; what it says of its progress is shown.

    Raises   SystemExit  when it fails
    """
    words = [sys.executable, "-m", *map(str, arguments)]
    ended = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words[2:])} ended with status {ended.returncode}")
    return ended.stdout


def run_of(plan: Plan, name: str) -> dict[str, Any]:
    """The results of that recipe's run, which is begun, or gone on with, where it is not finished."""
    folder = plan.root / "runs" / name
    if not (folder / "results.json").exists():
        resume = ["--resume"] if folder.exists() else []  # there may be no checkpoint yet
        command("stage2_student", "run", plan.recipe(name), *resume)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# --- parts -----------------------------------------------------------------------------------------------


def teacher(plan: Plan) -> dict[str, Any]:
    if plan.tiny and not (plan.root / "data").exists():
        draw_rows(plan.root)
    if not (plan.root / "base").exists():
        in_own_process(_make_base, plan)
    found = run_of(plan, "teacher")
    folder = plan.root / "runs" / "teacher"
    asked = ("--set", "evaluation.max_new_tokens=1", "--no-references", "--json", "--shuffle-pictures")
    shuffled = json.loads(
        command("stage2_student", "evaluate", folder, *asked, "--out", plan.root / "shuffled.parquet")
    )
    return {
        "ce_before": found["before"]["ce_loss"],
        "ce": found["after"]["ce_loss"],
        "ce_shuffled": shuffled[0]["ce"],
        "steps": found["step"],
    }


def _make_base(plan: Plan) -> None:
    if plan.tiny:
        texts = [" ".join(full_shapes.WORDS), "user model\n"] * 4
        save_vlm(plan.root / "base", *tiny_model(texts), vision=TINY_VISION)
    else:
        save_vlm(plan.root / "base", *read_package(plan.root))


def draw_rows(root: Path, *, train: int = 16, validation: int = 6) -> None:
    """So many rows of noise and of words at random, in two splits."""
    for split, count in {"train": train, "validation": validation}.items():
        rows = full_shapes.Rows(count=count, side=32, question=4, answer=8)
        full_shapes.write_rows(root / split, rows)
        (root / "data").mkdir(exist_ok=True)
        (root / split / "train-00000-of-00001.parquet").rename(
            root / "data" / f"{split}-00000-of-00001.parquet"
        )
        (root / split).rmdir()


def student(plan: Plan) -> dict[str, Any]:
    make_student(plan, "half", plan.num_layers)
    command("stage1_teacher", "capture", plan.recipe("student"))
    found = run_of(plan, "student")
    inspected = json.loads(command("stage1_teacher", "inspect", plan.root / "caches" / "default", "--json"))
    return {"before": found["before"], "after": found["after"], "cache": inspected}


def make_student(plan: Plan, name: str, num_layers: int) -> None:
    """The teacher with so many of its layers, where it is not there yet."""
    if not (plan.root / name).exists():
        in_own_process(_shorten, plan.root / "runs" / "teacher" / "export", plan.root / name, num_layers)


def _shorten(source: Path, out: Path, num_layers: int) -> None:
    shorten(source, out, num_layers=num_layers)


def targets(plan: Plan) -> dict[str, Any]:
    make_student(plan, "near", plan.num_layers_of_near)
    found: dict[str, Any] = in_own_process(_errors, plan, plan.root / "near")
    return found


def further(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = in_own_process(_errors, plan, plan.root / "base")
    return found


def _errors(plan: Plan, student: Path) -> dict[str, Any]:
    """Of each policy, size and tail."""
    torch.set_num_threads(1)
    policies: dict[str, Policy] = {f"threshold 1/{n}": Threshold(tau=1 / n) for n in ERROR_TAUS}
    policies |= {f"random {n}": Random(draws=n) for n in ERROR_DRAWS}
    policies |= {f"top-{n}": TopK(k=n) for n in ERROR_KS}
    schemes = [scheme(name, policy.kind, policy) for name, policy in policies.items()]
    for n in STEP_TAUS:
        schemes.append(scheme(f"threshold 1/{n}, fp16", FP16, Threshold(tau=1 / n, values="fp16")))
    error, answers = measure(_positions(plan, student), schemes)
    lines = table(schemes, error, answers)
    return {"positions": answers.shape[1], "lines": [vars(line) for line in lines]}


@torch.inference_mode()
def _positions(plan: Plan, student: Path) -> Iterator[Positions]:
    """Of teacher and student, over training rows; hidden states as their parts along random directions."""
    recipe = load_recipe(plan.recipe("student"))
    assert recipe.teacher is not None
    num_ids = open_processor(recipe.teacher.model, recipe.data).num_token_ids
    both = [
        load_vlm(str(name), revision=None, dtype=torch.bfloat16, attn_implementation=None)
        for name in (recipe.teacher.model, student)
    ]
    directions_DC: Tensor | None = None
    for batch in batches(recipe, recipe.teacher.model, plan.positions):
        logprobs, _ = distributions(both[0], batch, num_ids)
        student_logprobs, hidden_ND = distributions(both[1], batch, num_ids)
        if directions_DC is None:
            directions_DC = _directions(hidden_ND.shape[1])
        yield Positions(logprobs, student_logprobs, hidden_ND.float() @ directions_DC)


def _directions(width: int) -> Tensor:
    """(D, C), orthogonal: in the mean over them, the norm of a matrix times this is its own."""
    count = min(NUM_DIRECTIONS, width)
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q * (width / count) ** 0.5


def jobs_of(plan: Plan) -> list[Job]:
    """Seed by seed, the most telling variants first."""
    return [
        job_of(plan, variant, length, seed)
        for seed in plan.seeds
        for length in plan.lengths
        for variant in variants(plan)
    ]


def job_of(plan: Plan, variant: str, length: str, seed: int) -> Job:
    recipe = str(plan.recipe("student"))
    teaching, tail = variants(plan)[variant]
    return Job(recipe, variant, length, seed, plan.kd_ratio, teaching, plan.root, plan.held_out, tail)


def variants(plan: Plan) -> dict[str, tuple[Teaching, str | None]]:
    """How students are taught, and the tail of their loss; ``top_k`` with each tail that has won somewhere."""
    found: dict[str, tuple[Teaching, str | None]] = {LIVE: (LiveTeacher(), None), LABELS: (None, None)}
    for name in sizes(plan):
        kind, written = name.split()
        number = int(written.removeprefix("1/"))
        if kind == "top":
            found |= {f"{name}, {tail}": (TopK(k=number), tail) for tail in ("uniform", "ghost")}
        else:
            found[name] = (Threshold(tau=1 / number) if kind == "tau" else Random(draws=number)), None
    return found


def sizes(plan: Plan) -> dict[str, str | None]:
    """Names of variants with a cache, and of those whose bytes they have at most; chosen once."""
    path = plan.root / "sizes.json"
    if not path.exists():
        path.write_text(json.dumps(in_own_process(_sizes, plan)))
    found: dict[str, str | None] = json.loads(path.read_text())
    return found


def _sizes(plan: Plan) -> dict[str, str | None]:
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        recipe = load_recipe(plan.recipe("student"), overrides=["loss.kd_ratio=0"])  # no cache need be there
        found, at_most = policies_of_equal_size(
            recipe, world, taus=TAUS, num_examples=NUM_EXAMPLES, most=4096
        )
    return {name: at_most.get(name) for name in found}


def students(plan: Plan) -> dict[str, Any]:
    make_student(plan, "half", plan.num_layers)
    failed = run_missing(jobs_of(plan), plan.results)
    results = results_of(plan)
    at_most = {name: other for name, other in sizes(plan).items() if other is not None}
    return {
        "lengths": plan.lengths,
        "table": results.table(plan.lengths),
        "notes": results.notes(at_most),
        "stamps": results.stamps,
        "failed": failed,
    }


def results_of(plan: Plan) -> Results:
    mark = fingerprint(str(plan.recipe("student")))
    return Results("student", plan.kd_ratio, plan.results, fingerprint=mark, held_out=plan.held_out)


def steps(plan: Plan) -> dict[str, Any]:
    make_student(plan, "half", plan.num_layers)
    everything = [LABELS, *(name for name in variants(plan) if name != LABELS)]
    jobs = [job_of(plan, variant, TIMED, plan.seeds[0]) for variant in everything]
    path = plan.root / "students.json"
    failed = json.loads(path.read_text())["failed"] if path.exists() else []
    untimed = time_missing(jobs, plan.results, num_turns=plan.num_turns, but=failed)
    results = results_of(plan)
    rows = [[name, results.step(name)] for name in everything if results.step(name) != "-"]
    return {"table": rows, "stamps": results.stamps, "failed": untimed}


def show(bench: Bench, part: str, found: dict[str, Any], *, tiny: bool) -> None:
    """The tables of a part; ``student`` has none.  Those of a small random model have names of their own."""
    table = f"real_weights-tiny-{part}" if tiny else f"real_weights-{part}"
    stamps = found.get("stamps", [found])
    if part == "teacher":
        rows = [
            ["before fine-tuning", f"{found['ce_before']:.3f}"],
            [f"after {found['steps']} steps", f"{found['ce']:.3f}"],
            [
                f"after {found['steps']} steps, with the pictures of other cases",
                f"{found['ce_shuffled']:.3f}",
            ],
        ]
        bench.show(table, "A pretrained teacher", ("teacher, validation CE", "nats"), rows, stamps=stamps)
    elif part in ("targets", "further"):
        lines = [Line(**line) for line in found["lines"]]
        show_errors(bench, table, lines, notes=f"{found['positions']:,} positions.", stamps=stamps)
    elif part == "students":
        title = "Students of a pretrained teacher"
        bench.show(
            table, title, learned(found["lengths"]), found["table"], notes=found["notes"], stamps=stamps
        )
    elif part == "steps":
        head = ("taught by", "against labels alone")
        bench.show(table, "Processor time of a step", head, found["table"], stamps=stamps)


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "teacher": teacher,
    "targets": targets,
    "further": further,
    "student": student,
    "students": students,
    "steps": steps,
}
GO_ON = ("students", "steps")  # parts that find out by themselves what is missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT / "work" / "real")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", type=int, help="of the training split; all by default")
    parser.add_argument("--lengths", nargs="+", default=["1 epoch"], choices=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    parser.add_argument("--held-out", type=int, default=64, help="validation rows for the students' KL")
    parser.add_argument(
        "--positions", type=int, default=4096, help="for the errors of the gradient, at least"
    )
    parser.add_argument(
        "--turns",
        type=int,
        help="timed steps of each variant, at most those of an epoch; 20, or 2 with --tiny",
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model, drawn rows")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    plan = Plan(
        root=asked.root.resolve(),
        tiny=asked.tiny,
        rows=asked.rows,
        seeds=tuple(asked.seeds),
        lengths=tuple(asked.lengths),
        kd_ratio=asked.kd_ratio,
        held_out=asked.held_out,
        positions=asked.positions,
        num_turns=asked.turns or (2 if asked.tiny else 20),
    )
    bench = Bench("real_weights", goes_on=plan.root.exists())
    plan.root.mkdir(parents=True, exist_ok=True)
    plan.keep()
    plan.write_recipes()
    failed: list[Key] = []
    for name in asked.only:
        path = plan.root / f"{name}.json"
        if path.exists() and name not in GO_ON:
            show(bench, name, json.loads(path.read_text()), tiny=plan.tiny)
            continue
        print(f"\n=== {name}", flush=True)
        begin = time.monotonic()
        found = PARTS[name](plan) | stamp() | {"seconds": time.monotonic() - begin}
        path.write_text(json.dumps(found, indent=1) + "\n")
        show(bench, name, found, tiny=plan.tiny)
        told = {
            key: value for key, value in found.items() if key not in ("lines", "lengths", "table", "stamps")
        }
        print(json.dumps(told), flush=True)
        failed += found.get("failed", [])
    require_all(failed)


if __name__ == "__main__":
    main()
