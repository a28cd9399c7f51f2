"""Whole recipes by the commands that users type, and whether several ranks train what one rank does.

    python -m tests.benchmarks.bench_runs

``phantom`` and ``medpix_sample`` as they are, from nothing to the evaluation; the latter's student on two ranks, too,
and its cache against its teacher; and ``phantom`` with few rows and steps, on one rank and on four that share layers,
from one cache.  Folders are those of the seed 0 in work/benchmarks/seeds, where other benchmarks find the same runs;
what is finished is read and not run again.  Half an hour on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared.data.rows import open_split
from shared.pipeline import make_student
from shared.recipes import load_recipe
from tests.benchmarks.seeds import FOLDER, Seed, is_finished, require
from tests.benchmarks.tables import Bench

REAL, DRAWN = "medpix_sample", "phantom"
RUNS = {DRAWN: ("phantom_teacher", "phantom", "phantom_labels"), REAL: ("medpix_sample_teacher", REAL)}
ONE, TWO, SHARED = "one rank", "two ranks", "4 ranks, `parallel.tensor=2`"
SHORT = (
    "data.limit=80",
    "optimization.num_epochs=null",
    "optimization.max_steps=6",
    "evaluation.baseline=null",
)
HEAD = (
    "run",
    "rows",
    "steps",
    "CE before",
    "CE after",
    "KD before",
    "KD after",
    "KL after",
    "right",
    "bytes",
)


class Way(NamedTuple):
    """How a student is trained: what its run is called beside the recipe's name, on so many ranks."""

    run: str
    num_ranks: int
    changes: tuple[str, ...] = ()


WAYS = {
    ONE: Way("", 1),
    TWO: Way("-two", 2),
    SHARED: Way("-shared", 4, ("parallel.tensor=2",)),
}


class Runs(Seed):
    """Those of a recipe as it is, or with ``extra`` settings."""

    def make(self, name: str) -> dict[str, Any]:
        """Its losses, by kind and step; cache and teacher are made where they are missing."""
        way = WAYS[name]
        with self.folder_of_its_own():
            recipe = load_recipe(self.recipe)
            options = [*self.settings, f"run.name={recipe.run.name}{way.run}", *way.changes]
            plan = load_recipe(self.recipe, overrides=tuple(options))
            if not is_finished(plan):
                resume = ["--resume"] if plan.run.path.exists() else []
                require(make_student(self.recipe, options, nproc=way.num_ranks, stage_arguments=resume))
            return losses_of(plan.run.path)

    def key_of(self, name: str) -> str:
        return self.key(name, WAYS[name].changes, WAYS[name].num_ranks)

    @property
    def num_rows(self) -> int:
        """Of the training split."""
        with self.folder_of_its_own():
            return len(open_split(load_recipe(self.recipe, overrides=tuple(self.settings)).data, "train"))


def audit(runs: Runs) -> dict[str, Any]:
    """What the command says of the recipe's cache."""
    with runs.folder_of_its_own():
        command = [sys.executable, "-m", "stage1_teacher", "audit", f"work/caches/{runs.recipe}", "--json"]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def audit_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each figure of the cache, and the same of the teacher that runs a second time."""

    def cells(name: str, measured: Mapping[str, float | None], form: str, more: str = "") -> list[str]:
        both = ("-" if measured[key] is None else f"{measured[key]:{form}}" for key in ("cache", "floor"))
        own, floor = both
        return [name, own + more, floor]

    rows = [
        cells("top-1 agreement", found["top1_agreement"], ".2%"),
        cells("kept mass", found["kept_mass"], ".6f"),
    ]
    for name, title in (
        ("logprob_bias", "bias in log-prob, nats"),
        ("answer_bias", "bias at the answer's token"),
    ):
        error = found[f"{name}_error"]
        rows.append(
            cells(title, found[name], "+.1e", "" if error is None else f", standard error {error:.1e}")
        )
    for number, error in found["gradient_error"].items():
        if error["cache"] is not None:
            name = f"head gradient over {int(number):,} positions"
            rows.append(cells(f"{name}: relative error", error, ".2g"))
            rows.append(cells(f"{name}: cosine", found["gradient_cosine"][number], ".5f"))
    return rows


def losses_of(run: Path) -> dict[str, dict[int, float]]:
    """By step, of training steps and of validations."""
    found: dict[str, dict[int, float]] = {"step": {}, "validation": {}}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] in found:
            found[record["event"]][record["step"]] = record["loss"]
    return found


def summary(run: Path, num_rows: int) -> list[str]:
    """Under ``HEAD``."""
    results = json.loads((run / "results.json").read_text())
    before, after, right = results["before"], results["after"], results["answers"]["accuracy"]
    losses = [at[name] for name in ("ce_loss", "kd_loss") for at in (before, after)] + [after["kl"]]
    return [
        f"`{run.name}`",
        f"{num_rows:,}",
        f"{results['step']}",
        *("-" if loss is None else f"{loss:.3f}" for loss in losses),
        f"{right['mean']:.1%} of {right['count']}",
        f"{results['cache']['bytes_per_position']:.0f}" if results["cache"] else "-",
    ]


def by_step(found: Sequence[tuple[str, dict[int, float]]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a line for each number of ranks, a column for each step."""
    steps = list(found[0][1])
    return ["", *map(str, steps)], [[name, *(f"{its[step]:.4f}" for step in steps)] for name, its in found]


def differences(one: dict[str, dict[int, float]], other: dict[str, dict[int, float]]) -> list[list[str]]:
    """A row for each step, and one for the last validation."""
    places = [(f"{step}", "step", step) for step in one["step"]]
    places.append(("validation", "validation", max(one["validation"])))
    return [
        [
            name,
            f"{one[kind][at]:.6f}",
            f"{other[kind][at]:.6f}",
            f"{abs(other[kind][at] / one[kind][at] - 1):.0e}",
        ]
        for name, kind, at in places
    ]


def main() -> None:
    bench = Bench("runs", goes_on=FOLDER.exists())
    drawn, real = Runs(DRAWN, 0), Runs(REAL, 0)
    drawn.make(ONE)
    validations = [(way, real.make(way)["validation"]) for way in (ONE, TWO)]
    lines = [
        summary(runs.folder / "work/runs" / name, runs.num_rows)
        for runs in (drawn, real)
        for name in RUNS[runs.recipe]
    ]
    bench.show("runs", "Whole runs of two recipes", HEAD, lines)
    bench.show("runs-ranks", f"Validation loss of `{REAL}` by step, one rank and two", *by_step(validations))
    found = audit(real)
    notes = f"{found['num_examples']} examples, {found['num_positions']:,} positions."
    title, head = f"The cache of `{REAL}` against its teacher", ("", "cache", "noise floor")
    bench.show("runs-audit", title, head, audit_rows(found["results"][0]), notes=notes)
    short = Runs(DRAWN, 0, extra=SHORT)
    title = f"The recipe `{DRAWN}`, shortened, on one rank and on four"
    head = ("step", ONE, SHARED, "relative difference")
    bench.show("runs-shared", title, head, differences(short.make(ONE), short.make(SHARED)))


if __name__ == "__main__":
    main()
