"""A student with another tokenizer: taught by labels alone, and by a cache of its teacher regrouped.

    python -m tests.benchmarks.bench_tokenizers [--seeds 0 1 2] [--kd-ratios 0.5 0.9] [--limit 1600]

The teacher and the cache are those of the recipe ``phantom``.  The student's tokenizer has half the ids and is
trained on the pages of ``docs/``.  All students of a seed have the same first weights, steps and order.  What counts
is measured on held-out rows: KL from the teacher's *whole* distributions, regrouped, where both have a boundary; CE
per byte of the answers; short answers that are right to the letter.

Runs are ordinary ones, in work/benchmarks/tokenizers; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data.collation import Batch
from shared.data.processing import open_processor
from shared.data.rows import Example
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.other_vocabulary import Coverage, StudentOfAnother
from shared.recipes import Recipe, load_recipe
from shared.runtime import World, distributed
from shared.same_prompts import open_student_processor_of
from shared.small_models import make_small_model, train_tokenizer
from stage1_teacher.capturing.teacher import load_teacher
from stage2_student.training.inputs import open_inputs
from tests.benchmarks.tables import Bench

FOLDER = Path("work/benchmarks/tokenizers")
STUDENT = FOLDER / "student"
NUM_IDS = 800  # half of the teacher's
TOGETHER = 8  # held-out examples that pass a model together


@dataclass(frozen=True)
class Goal:
    """What the teacher says of some held-out examples, in the student's words.

    Shapes   probs_NV (N, V) fp32 of its whole distribution, regrouped, zero where no boundary is shared
    """

    batch: Batch
    probs_NV: Tensor
    coverage: Coverage
    num_bytes: int
    is_short: tuple[bool, ...]


@dataclass(frozen=True)
class Measured:
    """kl: nats a unit of mass at shared positions; ce: nats a byte; right: 0 to 1."""

    kl: float
    ce: float
    right: float


def prepare(settings: Sequence[str]) -> None:
    """Data, teacher and cache as ``make teacher-cache`` makes them, and the student's folder."""
    command = [sys.executable, "-m", "shared.pipeline", "teacher-cache", "phantom", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if STUDENT.exists():
        return
    pages = [page.read_text() for page in sorted(Path("docs").glob("*.md"))]
    tokenizer = train_tokenizer(pages, FOLDER / "tokenizer", vocab_size=NUM_IDS)
    recipe = load_recipe("phantom")
    assert recipe.bootstrap.small_models is not None
    (like,) = [one for one in recipe.bootstrap.small_models.models if one.path == recipe.student.model]
    make_small_model(STUDENT, tokenizer=tokenizer, **like.model_dump(exclude={"path"}))


def train(kd_ratio: float, seed: int, settings: Sequence[str]) -> Recipe:
    """Runs it unless it is finished; its recipe."""
    root = FOLDER / "-".join(["runs", *(one.partition("=")[2] for one in settings[1::2])])
    chosen = [
        *(f"student.model={STUDENT}", "student.other_vocabulary=true", f"loss.kd_ratio={kd_ratio}"),
        *(f"run.seed={seed}", f"run.name=kd-{kd_ratio}-seed-{seed}", f"run.root={root}"),
        *("evaluation.max_examples=0", "evaluation.baseline=null", "run.num_workers=0"),
    ]
    options = [*settings, *(part for one in chosen for part in ("--set", one))]
    command = [sys.executable, "-m", "stage2_student", "run", "phantom", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return load_recipe("phantom", overrides=options[1::2])


@torch.inference_mode()
def goals_of(recipe: Recipe, world: World) -> list[Goal]:
    """Of all held-out examples."""
    assert recipe.teacher is not None
    own = open_student_processor_of(recipe, recipe.student.model, revision=None)
    assert isinstance(own, StudentOfAnother)
    theirs = open_processor(recipe.teacher.model, recipe.data)
    teacher = load_teacher(recipe.teacher, num_token_ids=theirs.num_token_ids, world=world)
    found = open_inputs(recipe, world).validation
    assert found is not None
    examples = [found.split[int(row)] for row in found.rows]
    goals = []
    for some in _chunks(examples):
        logprobs_NV = teacher.logprobs(teacher.hidden(theirs.collate([theirs.encode(one) for one in some])))
        goals.append(_goal(recipe, own, some, logprobs_NV))
    return goals


def _chunks(examples: list[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), TOGETHER):
        yield examples[start : start + TOGETHER]


def _goal(recipe: Recipe, own: StudentOfAnother, examples: list[Example], logprobs_NV: Tensor) -> Goal:
    batch = own.collate([own.encode(one) for one in examples])
    probs_NV = torch.zeros(len(batch.labels), own.num_token_ids)
    kept, shared, row, first = 0.0, 0, 0, 0
    for example in examples:
        alignment = own.aligned(example).alignment
        for place, position in enumerate(alignment.teacher_N.tolist()):
            if position >= 0:
                p_V = logprobs_NV[first + position].exp()
                ids = own.vocabulary.first_ids(np.arange(len(p_V)), int(alignment.lead_N[place]))
                ids[alignment.their_label_N[place]] = alignment.label_N[place]
                ids_V = torch.from_numpy(ids).long()
                probs_NV[row + place].index_add_(0, ids_V[ids_V >= 0], p_V[ids_V >= 0])
                kept, shared = kept + p_V.sum().item(), shared + 1
        row, first = row + len(alignment.teacher_N), first + alignment.num_teacher_positions
    coverage = Coverage(len(batch.labels), shared, kept, probs_NV.sum().item())
    num_bytes = sum(len(one.answer.encode()) for one in examples)
    limit = recipe.evaluation.short_answer_words
    is_short = tuple(len(one.answer.split()) <= limit for one in examples)
    return Goal(batch, probs_NV, coverage, num_bytes, is_short)


@torch.inference_mode()
def measure(folder: Path, goals: list[Goal]) -> Measured:
    model = load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None).eval()
    body, head = split(model)
    kl = ce = 0.0
    right: list[bool] = []
    for goal in goals:
        hidden_BSD = last_hidden_states(body, goal.batch.inputs)
        logits_NV = head.logits(hidden_BSD.flatten(0, 1)[goal.batch.position_index]).float()
        logq_NV = logits_NV.log_softmax(-1)
        p_NV, mass_N1 = goal.probs_NV, goal.probs_NV.sum(-1, keepdim=True)
        log_p_NV = torch.where(p_NV > 0, p_NV / mass_N1, 1).log()
        kl += (p_NV * (log_p_NV - logq_NV[:, : p_NV.shape[1]])).sum().item()
        ce += F.nll_loss(logq_NV, goal.batch.labels, reduction="sum").item()
        hit_N = logq_NV.argmax(-1) == goal.batch.labels
        counts = goal.batch.example_offsets.diff().tolist()
        hits = [bool(one.all()) for one in hit_N.split(counts)]
        right += [hit for hit, is_short in zip(hits, goal.is_short, strict=True) if is_short]
    mass = sum(goal.coverage.mapped for goal in goals)
    num_bytes = sum(goal.num_bytes for goal in goals)
    return Measured(kl / mass, ce / num_bytes, statistics.fmean(right))


def _cell(values: list[float], form: str) -> str:
    """The mean over seeds, and their range in brackets."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kd-ratios", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="training rows, of the teacher and of the students")
    arguments = parser.parse_args()
    bench = Bench("tokenizers", goes_on=FOLDER.exists())
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    limit = [] if arguments.limit is None else ["--set", f"data.limit={arguments.limit}"]
    prepare(limit)
    settings = [*limit, "--set", f"optimization.num_epochs={arguments.epochs}"]
    goals: list[Goal] = []
    found: dict[float, list[Measured]] = {ratio: [] for ratio in (0.0, *arguments.kd_ratios)}
    for seed in arguments.seeds:
        for ratio, measured in found.items():
            recipe = train(ratio, seed, settings)
            if not goals:
                with distributed(device="cpu") as world:
                    goals = goals_of(recipe, world)
            measured.append(measure(recipe.run.path / "export", goals))
            print(
                f"  kd_ratio {ratio}, seed {seed}: {json.dumps(vars(measured[-1]))}",
                file=sys.stderr,
                flush=True,
            )
    coverage = sum((goal.coverage for goal in goals), Coverage())
    rows = []
    for ratio, measured in found.items():
        name = "labels alone" if ratio == 0 else f"the cache, `kd_ratio: {ratio:g}`"
        cells = [_cell([one.kl for one in measured], ".3f"), _cell([one.ce for one in measured], ".4f")]
        cells.append(_cell([100 * one.right for one in measured], ".1f") + " %")
        rows.append([name, *cells])
    bench.show(
        f"tokenizers-{arguments.epochs:g}",
        f"A student with another tokenizer, {arguments.epochs:g} epoch(s)",
        ("taught by", "KL, shared positions", "CE, nats a byte", "right"),
        rows,
        notes=f"Held out: {coverage.text()}. Means over seeds, their range in brackets.",
    )


if __name__ == "__main__":
    main()
