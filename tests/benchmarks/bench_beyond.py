"""Students taught by more than the given answers: the teacher's, their own, weighed and chosen positions.

    python -m tests.benchmarks.bench_beyond [--recipes phantom medpix_sample] [--seeds 0 1 2] [--ways NAME ...]

All students of a recipe and a seed have the same teacher, the same first weights and the same number of steps.  A
seed is that of ``bench_phantom``.  What counts is measured on held-out rows, with the given answers and along the
student's own greedy answers, by the ordinary commands.  ``bench_tokenizers`` has students with another tokenizer.

Each seed has a folder of its own in work/benchmarks/seeds, shared with ``bench_phantom``; what is finished is read
and not made again.  All of it takes hours: what docs/measured has of the same settings is not measured again either,
so that a second machine, or another day, goes on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.phantom.dataset import DRAWING_VERSION
from shared.pipeline import covers, launch, make_cache, make_rounds, make_student, settings_of_teacher
from shared.recipes import Recipe, dump_recipe, load_recipe
from shared.rounds import Rounds
from shared.rounds.loop import measure
from shared.rounds.plan import Round
from shared.rounds.table import outcomes
from tests.benchmarks.bench_phantom import FOLDER, settings
from tests.benchmarks.pages import measured
from tests.benchmarks.student_results import mean
from tests.benchmarks.tables import Bench, Table

GIVEN, RIGHT = "given answers", "right"
SHOWN = ("CE", "KL", "own CE", "own KL", RIGHT)
NUM_ROUNDS = 2
OWN_QUESTIONS = 400


@dataclass(frozen=True)
class Way:
    """How a student is taught.

    run      its run's name, behind that of the recipe
    changes  to the recipe
    writes   whether the teacher writes its answers first
    rounds   whether the steps are those of several rounds, together
    """

    run: str
    changes: tuple[str, ...] = ()
    writes: bool = False
    rounds: bool = False


WAYS = {
    GIVEN: Way(""),
    "labels alone": Way("_labels", ("loss.kd_ratio=0",)),  # its KL is read from the cache
    "the teacher's answers": Way("-written", writes=True),
    "rounds, half own answers": Way("-own", ("rounds.own_share=0.5",), rounds=True),
    "rounds, given answers": Way("-again", ("rounds.own_share=0",), rounds=True),
    "visual weight 0.5": Way("-visual", ("cache.visual_gain=blurred", "loss.visual_weight=0.5")),
    "positions 0.2, by the teacher": Way("-kept", ("loss.positions={keep: 0.2}",)),
    "positions 0.2, by the student": Way("-unsure", ("loss.positions={keep: 0.2, by: student_entropy}",)),
}


class Seed:
    """A recipe's students of one seed, in a folder of its own."""

    def __init__(self, recipe: str, seed: int, *, extra: Sequence[str] = ()) -> None:
        self.recipe, self.seed, self.extra = recipe, seed, extra
        source = Path(load_recipe(recipe).data.source)
        given = ["data.source=" + str(source.resolve())] if source.is_dir() and ".." in source.parts else []
        self.settings = [*settings(recipe, seed), *given, *extra]
        self.folder = FOLDER / recipe / f"seed-{seed}"

    def make(self, way: Way) -> dict[str, float]:
        """The student's figures, by name; the recipe's teacher and its cache are made where they are missing.

        Raises   SystemExit  when a command failed
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(self.folder):
            options = [*self.settings, *self._options(way)]
            plan = load_recipe(self.recipe, overrides=tuple(options))
            if way.rounds:
                _require(make_rounds(self.recipe, options, nproc=1))
                return self._of_rounds(plan)
            if not (plan.run.path / "results.json").exists():
                if way.writes:
                    self._write()
                resume = ["--resume"] if plan.run.path.exists() else []
                _require(make_student(self.recipe, options, nproc=1, stage_arguments=resume))
            return _figures(plan.run.path, self._along_own_answers(plan.run.name))

    def key(self, name: str) -> str:
        """Of a way's figures; another one where the recipe, its teacher's or the drawn set is another one."""
        way, given = WAYS[name], (*settings(self.recipe, self.seed), *self.extra)
        plans = [load_recipe(self.recipe, overrides=(*given, *way.changes))]
        if plans[0].teacher is not None and plans[0].teacher.trained_by is not None:
            shared = settings_of_teacher(given)
            plans.append(load_recipe(plans[0].teacher.trained_by, overrides=tuple(shared)))
        facts = [*map(dump_recipe, plans), asdict(way), NUM_ROUNDS, OWN_QUESTIONS, DRAWING_VERSION]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"seed {self.seed}, {name}, {digest[:12]}"

    def _options(self, way: Way) -> list[str]:
        recipe = load_recipe(self.recipe)
        assert recipe.cache is not None
        name = recipe.run.name + way.run
        options = [f"run.name={name}", f"evaluation.max_examples={OWN_QUESTIONS}", *way.changes]
        if way.run:
            options.append("evaluation.baseline=null")
        if way.writes:
            options.append(f"data.written=[{Path('work/written').absolute()}]")
        if way.rounds:
            assert recipe.optimization.num_epochs is not None
            epochs = recipe.optimization.num_epochs / (NUM_ROUNDS + 1)
            options += [f"rounds.number={NUM_ROUNDS}", f"optimization.num_epochs={epochs}"]
            options += ["write.temperature=1", f"write.max_new_tokens={recipe.data.max_answer_tokens}"]
        if any(one.startswith("cache.") for one in way.changes):
            options.append(f"cache.path={recipe.cache.location}{way.run}")
        return options

    def _write(self) -> None:
        """The teacher's greedy answers to all training prompts."""
        _require(make_cache(self.recipe, self.settings, nproc=1))  # and the teacher
        longest = load_recipe(self.recipe).data.max_answer_tokens
        options = [*self.settings, f"write.max_new_tokens={longest}", "write.path=work/written"]
        _require(launch("stage1_teacher", "write", self.recipe, options, [], nproc=1))

    def _along_own_answers(self, name: str) -> dict[str, Any]:
        """CE and KL of a run's student along its own greedy answers to held-out prompts."""
        options = [*self.settings, f"run.name={name}", f"evaluation.max_examples={OWN_QUESTIONS}"]
        plan = load_recipe(self.recipe, overrides=tuple(options))
        one = Rounds(plan, num_rows=0).of(0)

        def command(module: str, verb: str, about: str, arguments: Sequence[str], *, what: str) -> int:
            return launch(module, verb, about, (), arguments, nproc=1, what=what)

        _require(measure(one, command, covers))
        return _along(one)

    def _of_rounds(self, plan: Recipe) -> dict[str, float]:
        planned = Rounds.of_recipe(plan)
        *_, last = outcomes(planned)
        return _figures(planned.all[-1].run, _along(planned.all[-1])) | {
            "captured": last.captured,
            "live": last.live,
        }


def _along(one: Round) -> dict[str, Any]:
    """CE and KL along own answers; empty where no answer shows anything."""
    return _read(one.losses)[0] if one.losses.exists() else {}


def _figures(run: Path, own: dict[str, Any]) -> dict[str, float]:
    results = _read(run / "results.json")
    after = results["after"]
    return {
        "CE": after["ce_loss"],
        "KL": after["kl"],
        "own CE": own.get("ce", math.nan),
        "own KL": own.get("kl", math.nan),
        RIGHT: results["answers"]["accuracy"]["mean"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _require(status: int) -> None:
    if status:
        raise SystemExit(status)


def table(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A line for each way, with the columns ``SHOWN``: means over the seeds that it has, and half their range."""
    lines = []
    for way, figures in found.items():
        cells = [mean([one[name] for one in figures], ".1%" if name == RIGHT else ".3f") for name in SHOWN]
        lines.append([way, f"{len(figures)}", *cells])
    return lines


def seed_in(key: str) -> int:
    """That of ``Seed.key``."""
    return int(key.removeprefix("seed ").partition(",")[0])


def table_name(recipe: str) -> str:
    return f"beyond-{recipe}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="NAME", default=list(WAYS))
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="SECTION.KEY=VALUE")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    before = {
        name: Table.read(measured(name)).parts
        for name in map(table_name, chosen.recipes)
        if measured(name).exists()
    }
    bench = Bench("beyond", goes_on=FOLDER.exists() or bool(before))
    for recipe in chosen.recipes:
        name = table_name(recipe)
        known = before.get(name, {})
        parts: dict[str, Any] = {}
        found: dict[str, list[dict[str, float]]] = {}
        for number in sorted({*chosen.seeds, *map(seed_in, known)}):
            seed = Seed(recipe, number, extra=chosen.extra)
            for way in WAYS:
                key = seed.key(way)
                if key not in known and (number not in chosen.seeds or way not in chosen.ways):
                    continue
                parts[key] = figures = known.get(key) or seed.make(WAYS[way])
                found.setdefault(way, []).append(figures)
                print(f"  {recipe}, {key}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        bench.show(
            name,
            f"Students of `{recipe}`, taught by more than the given answers",
            ("taught by", "seeds", *SHOWN),
            table(found),
            notes="Means over seeds, half their range in brackets.",
            parts=parts,
        )


if __name__ == "__main__":
    main()
