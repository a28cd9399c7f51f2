"""Students with another tokenizer than their teacher's: taught by labels alone, and by its cache, regrouped.

    python -m tests.benchmarks.bench_tokenizers [--recipes phantom medpix_sample] [--seeds 0 1 2] [--ways NAME ...]

The students' tokenizer has half the ids of the recipe's and is trained on the pages of ``docs/`` as they are when a
seed begins, without tables of benchmarks.  Each part names its tokenizer; those before 1 December 2026 do not, and
theirs saw the tables too.  All students of a
seed have the same teacher, first weights, steps and order.  What counts is measured on held-out rows: KL from the
teacher's *whole* distributions, regrouped, where both have a boundary; CE per byte of the answers; short answers that
are right.

Each seed has a folder of its own, shared with ``bench_beyond`` (see ``tests.benchmarks.seeds``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shared.data.collation import Batch
from shared.data.processing import open_processor
from shared.data.rows import Example
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.other_vocabulary import Coverage, StudentOfAnother
from shared.pipeline import launch
from shared.recipes import Recipe, load_recipe
from shared.runtime import World, distributed
from shared.same_prompts import open_student_processor_of
from shared.small_models import make_small_model, train_tokenizer
from stage1_teacher.capturing.teacher import load_teacher
from stage2_student.training.inputs import open_inputs
from tests.benchmarks.pages import BLOCK, documents
from tests.benchmarks.seeds import RIGHT, Seed, is_finished, require, show

FOLDER = Path("work/tokenizers")  # of a seed
STUDENT = FOLDER / "student"
OWN_QUESTIONS = 400
WAYS = {"labels alone": 0.0, "the cache, `kd_ratio: 0.5`": 0.5, "the cache, `kd_ratio: 0.9`": 0.9}
KL, CE, SHARED = "KL, shared positions", "CE, nats a byte", "shared"
SHOWN = {KL: ".3f", CE: ".4f", RIGHT: ".1%", SHARED: ".1%"}
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


class Students(Seed):
    """A recipe's students of one seed, with another tokenizer."""

    goals: list[Goal] | None = None

    def make(self, way: str) -> dict[str, Any]:
        """Teacher and cache are made where they are missing."""
        with self.folder_of_its_own():
            recipe = self._train(way)
            results = json.loads((recipe.run.path / "results.json").read_text())
            model = load_vlm(
                str(recipe.run.path / "export"), revision=None, dtype=torch.float32, attn_implementation=None
            )
            return measure(model.eval(), self._goals(recipe)) | {
                RIGHT: results["answers"]["accuracy"]["mean"],
                "tokenizer": hashlib.sha256((STUDENT / "tokenizer.json").read_bytes()).hexdigest()[:12],
            }

    def key_of(self, way: str) -> str:
        return self.key(way, [f"loss.kd_ratio={WAYS[way]}"], OWN_QUESTIONS)

    def _train(self, way: str) -> Recipe:
        """Runs it unless it is finished; its recipe."""
        options = [
            *self.settings,
            *(f"student.model={STUDENT}", "student.other_vocabulary=true", f"loss.kd_ratio={WAYS[way]}"),
            *(f"run.name={self.recipe}-other-{WAYS[way]}", "evaluation.baseline=null"),
            f"evaluation.max_examples={OWN_QUESTIONS}",
        ]
        recipe = load_recipe(self.recipe, overrides=tuple(options))
        if not is_finished(recipe):
            self.make_cache()
            make_student(recipe)
            resume = ["--resume"] if recipe.run.path.exists() else []
            require(launch("stage2_student", "run", self.recipe, options, resume, nproc=1))
        return recipe

    def _goals(self, recipe: Recipe) -> list[Goal]:
        """Those of the seed's teacher; they hold for all its students."""
        if self.goals is None:
            with distributed(device="cpu") as world:
                self.goals = goals_of(recipe, world)
        return self.goals


def texts() -> list[str]:
    """The pages without tables of benchmarks: what this one records is no part of what it measures."""
    return [BLOCK.sub("", page.read_text(encoding="utf-8")) for page in documents()]


def make_student(recipe: Recipe) -> None:
    """An untrained one of the shapes of the recipe's, with a tokenizer of its own; nothing where it is there."""
    if STUDENT.exists():
        return
    models = recipe.bootstrap.small_models
    assert models is not None
    tokenizer = train_tokenizer(texts(), FOLDER / "tokenizer", vocab_size=models.vocab_size // 2)
    like = models.models[-1]
    make_small_model(STUDENT, tokenizer=tokenizer, **like.model_dump(exclude={"path"}))


@torch.inference_mode()
def goals_of(recipe: Recipe, world: World) -> list[Goal]:
    """What the teacher says of all held-out examples."""
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
        goals.append(_goal(own, some, logprobs_NV))
    return goals


def _chunks(examples: list[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), TOGETHER):
        yield examples[start : start + TOGETHER]


def _goal(own: StudentOfAnother, examples: list[Example], logprobs_NV: Tensor) -> Goal:
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
    return Goal(batch, probs_NV, coverage, num_bytes)


@torch.inference_mode()
def measure(model: PreTrainedModel, goals: list[Goal]) -> dict[str, float]:
    """KL, in nats a unit of mass at shared positions, and CE, in nats a byte of the answers."""
    body, head = split(model)
    kl = ce = 0.0
    for goal in goals:
        hidden_BSD = last_hidden_states(body, goal.batch.inputs)
        logits_NV = head.logits(hidden_BSD.flatten(0, 1)[goal.batch.position_index]).float()
        logq_NV = logits_NV.log_softmax(-1)
        p_NV, mass_N1 = goal.probs_NV, goal.probs_NV.sum(-1, keepdim=True)
        log_p_NV = torch.where(p_NV > 0, p_NV / mass_N1, 1).log()
        kl += (p_NV * (log_p_NV - logq_NV[:, : p_NV.shape[1]])).sum().item()
        ce += F.nll_loss(logq_NV, goal.batch.labels, reduction="sum").item()
    num_bytes = sum(goal.num_bytes for goal in goals)
    coverage = sum((goal.coverage for goal in goals), Coverage())
    return {KL: kl / coverage.mapped, CE: ce / num_bytes, SHARED: coverage.share_of_positions}


def main() -> None:
    show(
        "tokenizers",
        Students,
        list(WAYS),
        title="Students with another tokenizer than their teacher's",
        columns=SHOWN,
        ratios=[KL, CE],
        description=__doc__,
        note="A seed's tokenizer is that of the day it began: the parts name them.",
    )


if __name__ == "__main__":
    main()
