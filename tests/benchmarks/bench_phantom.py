"""What the default recipe comes to, over several seeds: `make train-student` from nothing, again and again.

    python -m tests.benchmarks.bench_phantom [--seeds 0 1 2] [--folder work/benchmarks/seeds/phantom]

A seed is that of the drawn set, of both models' first weights, and of the order of training.  Each runs in a folder
of its own, ten minutes on two cores; a folder that is finished is read and not run again.  ``bench_beyond`` and
``bench_tokenizers`` train more students in these folders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.recipes import load_recipe
from tests.benchmarks.seeds import FOLDER, is_finished, settings
from tests.benchmarks.tables import Bench

RECIPE = "phantom"
RUNS = {"teacher": "phantom_teacher", "from the cache": "phantom", "labels alone": "phantom_labels"}
HEAD = (
    "seed",
    "minutes",
    "teacher right",
    "shuffled",
    "from the cache",
    "labels alone",
    "KL cache",
    "KL labels",
)


def run(folder: Path, seed: int) -> float:
    """Seconds from nothing to the table; as long as it took when the folder is finished already.

    Raises   SystemExit  when the folder is of another recipe
    """
    taken = folder / "seconds.json"
    if taken.exists():
        with contextlib.chdir(folder):
            is_finished(load_recipe(RECIPE, overrides=tuple(settings(RECIPE, seed))))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "shared.pipeline", "train-student", RECIPE]
        begin = time.perf_counter()
        options = [part for item in settings(RECIPE, seed) for part in ("--set", item)]
        subprocess.run([*command, *options], cwd=folder, check=True)
        taken.write_text(json.dumps(time.perf_counter() - begin))
    return float(json.loads(taken.read_text()))


def figures(folder: Path, seed: int, seconds: float) -> list[float]:
    """In the order of ``HEAD``."""
    found = {name: _results(folder / "work/runs" / run_name) for name, run_name in RUNS.items()}
    right = {name: results["answers"]["accuracy"]["mean"] for name, results in found.items()}
    shuffled = found["teacher"]["shuffled_pictures"]["accuracy"]["mean"]
    kl = [found[name]["after"]["kl"] for name in ("from the cache", "labels alone")]
    return [seed, seconds / 60, right.pop("teacher"), shuffled, *right.values(), *kl]


def table(rows: Sequence[Sequence[float]]) -> list[list[str]]:
    """Under ``HEAD``: a line for each seed, then mean and standard deviation."""
    columns = list(zip(*rows, strict=True))
    lines = [[f"{int(row[0])}", *map(_cell, row[1:], HEAD[1:])] for row in rows]
    if len(rows) > 1:
        lines.append(
            ["mean", *(_cell(statistics.fmean(c), h) for c, h in zip(columns[1:], HEAD[1:], strict=True))]
        )
        lines.append(
            ["scatter", *(_cell(statistics.stdev(c), h) for c, h in zip(columns[1:], HEAD[1:], strict=True))]
        )
    return lines


def _cell(value: float, column: str) -> str:
    if column == "minutes":
        return f"{value:.1f}"
    return f"{value:.3f}" if column.startswith("KL") else f"{value:.1%}"


def _results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="The default recipe over several seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=FOLDER / RECIPE)
    chosen = parser.parse_args()
    bench, rows = Bench("phantom", goes_on=chosen.folder.exists()), []
    for seed in chosen.seeds:
        folder = chosen.folder.resolve() / f"seed-{seed}"
        rows.append(figures(folder, seed, run(folder, seed)))
        bench.show("phantom", "The default recipe over several seeds", HEAD, table(rows))


if __name__ == "__main__":
    main()
