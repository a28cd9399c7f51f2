"""Recipes with small models, several times: a seed draws anew whatever is random in one.

    class Students(Seed): ...    # how one is made, and measured
    show("beyond", Students, ways, title="Students", columns={"KL": ".3f"}, ratios=["KL"], ...)

Benchmarks of many hours share these folders, and with them teachers and caches: what is finished is not made again.
What docs/measured has of the same settings is not measured again either, so that a second machine, or another day,
goes on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.finished import run_is_finished
from shared.phantom.dataset import DRAWING_VERSION
from shared.pipeline import make_cache, settings_of_teacher
from shared.recipes import Recipe, dump_recipe, load_recipe
from tests.benchmarks.pages import measured
from tests.benchmarks.student_results import mean
from tests.benchmarks.tables import ROOT, Bench, Table, stamp

FOLDER = ROOT / "work" / "benchmarks" / "seeds"  # a folder for each recipe, with one for each seed
NOTES = "Means over seeds, half their range in brackets. `/`: ratio to the first line's, of the same seed."
RIGHT = "right"  # the figure of short answers


def settings(recipe: str, seed: int) -> list[str]:
    """All of what is random in a recipe with small models, drawn anew; seed 0 is the recipe as it is."""
    plan = load_recipe(recipe)
    models = dump_recipe(plan)["bootstrap"]["small_models"]["models"]
    models = [model | {"seed": model["seed"] + 10 * seed} for model in models]
    return [
        *([f"bootstrap.phantom.seed={seed}"] if plan.bootstrap.phantom else []),
        f"bootstrap.small_models.models={json.dumps(models)}",
        *([f"run.seed={plan.run.seed + seed}"] if seed else []),
    ]


class Seed(ABC):
    """A recipe's data, teacher and cache, drawn anew, and the students of it that a benchmark makes.

    number    0 is the recipe as it is
    extra     settings of all its commands
    settings  those, and what draws it anew
    """

    def __init__(self, recipe: str, number: int, *, extra: Sequence[str] = ()) -> None:
        self.recipe, self.number = recipe, number
        drawn = settings(recipe, number)
        source = Path(load_recipe(recipe).data.source)
        beside = ["data.source=" + str(source.resolve())] if source.is_dir() and ".." in source.parts else []
        self.given = [*drawn, *extra]  # on every machine
        self.settings = [*drawn, *beside, *extra]
        # Settings beside the recipe's change the teacher or the runs, which have the same names all the same.
        of_its_own = f"-{hashlib.sha256(json.dumps(list(extra)).encode()).hexdigest()[:12]}" if extra else ""
        self.folder = FOLDER / recipe / f"seed-{number}{of_its_own}"

    @abstractmethod
    def make(self, way: str) -> dict[str, Any]:
        """The figures of a student taught that way, by name.

        Raises   SystemExit  when a command failed
        """

    @abstractmethod
    def key_of(self, way: str) -> str:
        """Of these figures: see ``key``."""

    @contextlib.contextmanager
    def folder_of_its_own(self) -> Iterator[None]:
        """Where commands make what the recipe names by relative paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(self.folder):
            yield

    def make_cache(self) -> None:
        """And the teacher; nothing where they are there.

        Raises   SystemExit  when a command failed
        """
        require(make_cache(self.recipe, self.settings, nproc=1))

    def key(self, name: str, changes: Sequence[str], *facts: Any) -> str:
        """Of figures; another one where the recipe, its teacher's, the drawn set or another fact is another one.

        Settings count where they are not those by default: a new one must not make all figures unknown.
        """
        plans = [load_recipe(self.recipe, overrides=(*self.given, *changes))]
        if plans[0].teacher is not None and plans[0].teacher.trained_by is not None:
            shared = settings_of_teacher(self.given)
            plans.append(load_recipe(plans[0].teacher.trained_by, overrides=tuple(shared)))
        chosen = [plan.model_dump(mode="json", exclude_defaults=True) for plan in plans]
        text = json.dumps([*chosen, *facts, DRAWING_VERSION], sort_keys=True)
        return f"seed {self.number}, {name}, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def show(
    benchmark: str,
    students: type[Seed],
    ways: Sequence[str],
    *,
    title: str,
    columns: Mapping[str, str],
    ratios: Collection[str],
    description: str,
    note: str = "",
) -> None:
    """Measures what the command line asks for, and shows a table for each recipe.

    ways     the first is what others are compared with
    title    a sentence about the students of one recipe, which is named behind it
    columns  names of figures, and their format
    ratios   those of them that are also shown in parts of the first way's, of the same seed
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=ways, metavar="NAME", default=ways)
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="SECTION.KEY=VALUE")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    tables = {recipe: f"{benchmark}-{recipe}" for recipe in asked.recipes}
    bench = Bench(benchmark, goes_on=FOLDER.exists() or any(map(known_of, tables.values())))
    for recipe, table in tables.items():
        known = known_of(table)
        parts: dict[str, dict[str, Any]] = {}
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for number in sorted({*asked.seeds, *map(_seed_in, known)}):
            seed = students(recipe, number, extra=asked.extra)
            for way in ways:
                key = seed.key_of(way)
                if key not in known and (number not in asked.seeds or way not in asked.ways):
                    continue
                parts[key] = figures = known.get(key) or seed.make(way) | stamp()
                found.setdefault(way, {})[number] = figures
                print(f"  {recipe}, {key}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        head, rows = lines(found, columns, ratios)
        bench.show(
            table,
            f"{title}, `{recipe}`",
            head,
            rows,
            notes=f"{NOTES} {note}".rstrip(),
            parts=parts,
            stamps=parts.values(),
        )


def known_of(table: str) -> Mapping[str, dict[str, Any]]:
    """What docs/measured has, by key; what is still true of it is not measured again.

    Figures without a stamp are of the table's day and commit, or of those before.
    """
    if not measured(table).exists():
        return {}
    known = Table.read(measured(table))
    source = {name: getattr(known.source, name) for name in ("date", "commit", "goes_on")}
    return {key: figures if "date" in figures else figures | source for key, figures in known.parts.items()}


def lines(
    found: Mapping[str, Mapping[int, dict[str, Any]]], columns: Mapping[str, str], ratios: Collection[str]
) -> tuple[list[str], list[list[str]]]:
    """A table's head, and a line for each way: how many seeds it has, and their means."""
    head = ["taught by", "seeds"] + [
        cell for name in columns for cell in [name, *(["/"] if name in ratios else [])]
    ]
    first = next(iter(found.values()), {})
    rows = []
    for way, of_seed in found.items():
        row = [way, f"{len(of_seed)}"]
        for name, form in columns.items():
            # Seeds of earlier days lack the figures that came later.
            values = [one[name] for one in of_seed.values() if name in one]
            row.append(mean(values, form))
            if name in ratios:
                both = [(one, first.get(number, {})) for number, one in of_seed.items()]
                parts = [one[name] / other[name] for one, other in both if name in one and name in other]
                row.append(mean(parts, ".3f"))
        rows.append(row)
    return head, rows


def _seed_in(key: str) -> int:
    """That of ``Seed.key``."""
    return int(key.removeprefix("seed ").partition(",")[0])


def is_finished(plan: Recipe) -> bool:
    """Whether nothing is left to train of a run; in the folder of its seed.

    Raises   SystemExit  when its folder is of another recipe, as this one was on an earlier day
    """
    folder = plan.run.path.absolute()
    if not (folder / "recipe.yaml").exists():
        return False
    began = load_recipe(folder / "recipe.yaml")
    if plan.as_it_began(began).of_a_run() != began.of_a_run():
        raise SystemExit(
            f"{folder}: this run was begun with other settings than the recipe has now. Remove the folder of its "
            f"seed, {Path.cwd()}, and start again: all of it is made anew"
        )
    return run_is_finished(plan)


def require(status: int) -> None:
    """Raises   SystemExit  with a command's status that is not 0"""
    if status:
        raise SystemExit(status)
