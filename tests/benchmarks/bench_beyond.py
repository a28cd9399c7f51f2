"""Students taught by more than the given answers: the teacher's, their own, weighed and chosen positions.

    python -m tests.benchmarks.bench_beyond [--recipes phantom medpix_sample] [--seeds 0 1 2] [--ways NAME ...]

All students of a recipe and a seed have the same teacher, the same first weights and the same number of steps.  A
seed is that of ``bench_phantom``.  What counts is measured on held-out rows, with the given answers and along the
student's own greedy answers, by the ordinary commands.  ``bench_tokenizers`` has students with another tokenizer.

Each seed has a folder of its own, shared with ``bench_phantom``.  All of it takes hours, and goes on with what is
there (see ``tests.benchmarks.seeds``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.data.written import WRITTEN
from shared.pipeline import covers, launch, make_rounds, make_student
from shared.recipes import Recipe, load_recipe
from shared.rounds import Rounds
from shared.rounds.loop import measure
from shared.rounds.plan import Round
from shared.rounds.table import outcomes
from tests.benchmarks.seeds import RIGHT, Seed, is_finished, require, show

GIVEN = "given answers"
CUT = "cut"  # share of own greedy answers that have not ended at the limit: mostly they repeat themselves
ROW_KL = "own KL, a row"  # each answer counted alike
SHOWN = {"CE": ".3f", "KL": ".3f", "own CE": ".3f", "own KL": ".3f", ROW_KL: ".3f", CUT: ".1%", RIGHT: ".1%"}
NUM_ROUNDS = 2
OWN_QUESTIONS = 400
ONE_SCHEDULE = "rounds.one_schedule=true"


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
    "rounds, half own answers": Way("-own-one", (ONE_SCHEDULE, "rounds.own_share=0.5"), rounds=True),
    "rounds, own answers by KD alone": Way(
        "-own-kd", (ONE_SCHEDULE, "rounds.own_share=0.5", "loss.own_kd_ratio=1"), rounds=True
    ),
    "rounds, given answers": Way("-again-one", (ONE_SCHEDULE, "rounds.own_share=0"), rounds=True),
    "visual weight 0.5": Way("-visual", ("cache.visual_gain=blurred", "loss.visual_weight=0.5")),
    "positions 0.2, by the teacher": Way("-kept", ("loss.positions={keep: 0.2}",)),
    "positions 0.2, by the student": Way("-unsure", ("loss.positions={keep: 0.2, by: student_entropy}",)),
    "the same, CE at all": Way("-unsure-all", ("loss.positions={keep: 0.2, by: student_entropy, ce: all}",)),
}


class Students(Seed):
    """A recipe's students of one seed."""

    def make(self, name: str) -> dict[str, float]:
        """Teacher and cache are made where they are missing."""
        way = WAYS[name]
        with self.folder_of_its_own():
            options = [*self.settings, *self._options(way)]
            plan = load_recipe(self.recipe, overrides=tuple(options))
            finished = is_finished(plan)
            if way.rounds:
                require(make_rounds(self.recipe, options, nproc=1))
                return self._of_rounds(plan)
            if not finished:
                if way.writes:
                    self._write()
                resume = ["--resume"] if plan.run.path.exists() else []
                require(make_student(self.recipe, options, nproc=1, stage_arguments=resume))
            return _figures(plan.run.path, self._along_own_answers(plan.run.name))

    def key_of(self, name: str) -> str:
        way = WAYS[name]
        return self.key(name, way.changes, asdict(way), NUM_ROUNDS, OWN_QUESTIONS)

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
        """The teacher's greedy answers to all training prompts; what is held out keeps the given ones."""
        self.make_cache()
        longest = load_recipe(self.recipe).data.max_answer_tokens
        options = [
            *self.settings,
            f"write.max_new_tokens={longest}",
            "write.splits=[train]",
            "write.path=work/written",
        ]
        require(launch("stage1_teacher", "write", self.recipe, options, [], nproc=1))

    def _along_own_answers(self, name: str) -> dict[str, Any]:
        """CE and KL of a run's student along its own greedy answers to held-out prompts."""
        options = [*self.settings, f"run.name={name}", f"evaluation.max_examples={OWN_QUESTIONS}"]
        plan = load_recipe(self.recipe, overrides=tuple(options))
        one = Rounds(plan, num_rows=0).of(0)

        def command(module: str, verb: str, about: str, arguments: Sequence[str], *, what: str) -> int:
            return launch(module, verb, about, (), arguments, nproc=1, what=what)

        require(measure(one, command, covers))
        return _along(one)

    def _of_rounds(self, plan: Recipe) -> dict[str, float]:
        planned = Rounds.of_recipe(plan)
        *_, last = outcomes(planned)
        return _figures(planned.all[-1].run, _along(planned.all[-1])) | {
            "captured": last.captured,
            "live": last.live,
        }


def _along(one: Round) -> dict[str, Any]:
    """CE and KL along own answers, empty where no answer shows anything; and the share of them that was cut."""
    counts = _read(one.greedy / WRITTEN)["counts"]
    losses = _read(one.losses)[0] if one.losses.exists() else {}
    return {**losses, CUT: counts["cut"] / max(1, counts["answers"])}


def _figures(run: Path, own: dict[str, Any]) -> dict[str, float]:
    results = _read(run / "results.json")
    after = results["after"]
    return {
        "CE": after["ce_loss"],
        "KL": after["kl"],
        "own CE": own.get("ce", math.nan),
        "own KL": own.get("kl", math.nan),
        **({ROW_KL: own["by_row"]["kl"]} if "kl" in own.get("by_row", {}) else {}),
        CUT: own[CUT],
        RIGHT: results["answers"]["accuracy"]["mean"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    show(
        "beyond",
        Students,
        list(WAYS),
        title="Students that are taught by more than the given answers",
        columns=SHOWN,
        ratios=["KL", "own KL", ROW_KL],
        description=__doc__,
    )


if __name__ == "__main__":
    main()
