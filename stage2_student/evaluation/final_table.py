"""The table at the end of a run: the student beside its teacher, and beside the run that its recipe compares it with.

    click.echo("\\n".join(final_table(recipe, results)))

Everything is read from what finished runs have left: ``results.json`` and the answers beside it.  Losses and answers
stand side by side only where they are over the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from shared.errors import RecipeError, TeachonceError
from shared.recipes import Recipe, baseline_of, load_recipe, trainer_of
from stage2_student.evaluation.answer_metrics import Interval, mean_interval
from stage2_student.evaluation.evaluate import default_split
from stage2_student.evaluation.evaluated import STUDENT
from stage2_student.evaluation.scores import read_predictions
from stage2_student.runs.identity import differing_settings
from stage2_student.runs.run_folder import RunFolder

HEAD = f"{'':<29}{'steps':>6}{'time':>8}{'CE':>8}{'KL':>8}   {'short answers right':<21}{'of':>6}"
WIDTH = 98  # of a line below the table
LEGEND = "CE, KL: held-out nats a position; KL to the teacher at temperature 1. Brackets: 95 % intervals."


@dataclass(frozen=True)
class Row:
    """One model, as far as it is known."""

    label: str
    steps: int | None = None
    training_s: float | None = None
    ce: float | None = None
    kl: float | None = None
    right: dict[str, Any] | None = None  # an Interval of short answers

    def line(self) -> str:
        right = Interval(**self.right) if self.right else None
        cells = (
            f"{_text(self.steps, 'd'):>6}",
            f"{_text(self.training_s, '.0f', ' s'):>8}",
            f"{_text(self.ce, '.3f'):>8}",
            f"{_text(self.kl, '.3f'):>8}",
            f"   {right.text() if right else '-':<21}",
            f"{_text(right.count if right else None, 'd'):>6}",
        )
        return f"  {self.label:<27}{''.join(cells)}"


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    recipe  as it was run: with the settings of its command, and what it chose itself
    """

    recipe: Recipe
    folder: RunFolder
    results: dict[str, Any]

    @classmethod
    def find(cls, recipe: Recipe, *, like: dict[str, Any]) -> Finished | None:
        """That recipe's run; None where it is not finished, or was measured on other examples than ``like``."""
        folder = RunFolder(recipe.run.path)
        try:
            results = folder.read_results()
            recipe = load_recipe(folder.recipe) if folder.recipe.exists() else recipe
        except TeachonceError:  # damaged: the run itself says so when it is asked for
            return None
        if results is None or results.get("validation") != like.get("validation"):
            return None
        return cls(recipe, folder, results)

    @property
    def right(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = (self.results["answers"] or {}).get("accuracy")
        return found

    def loss(self, name: str) -> float | None:
        value: float | None = (self.results["after"] or {}).get(name)
        return value

    def row(self, label: str) -> Row:
        seconds = self.results["times_s"]["training"]
        return Row(label, self.results["step"], seconds, self.loss("ce_loss"), self.loss("kl"), self.right)

    def answers(self) -> dict[tuple[int, str], tuple[bool, str]]:
        """By row and question, of short answers: whether it is right, and the picture."""
        path = self.folder.predictions(default_split(self.recipe))
        if not path.exists():
            return {}
        lines = read_predictions(path)
        return {
            (line["row"], line["question"]): (line["is_right"], line["image_sha256"])
            for line in lines
            if line["model"] == STUDENT and line["is_short"]
        }


def final_table(recipe: Recipe, results: dict[str, Any]) -> list[str]:
    """The table's lines, at most 100 characters each, in a line or two what it says, and notes on what it lacks."""
    folder = RunFolder(recipe.run.path)
    run = Finished(folder.as_it_began(recipe), folder, results)
    notes: list[str] = []
    teacher = _other(run, _teacher_of, notes)
    baseline = _other(run, lambda own: baseline_of(own, tell=lambda why: notes.append(f"note: {why}")), notes)
    lines = [HEAD, *(row.line() for row in _rows(run, teacher, baseline)), f"  {LEGEND}"]
    return [*lines, *(f"  {line}" for line in _meaning(run, teacher, baseline)), *notes]


def _other(run: Finished, find: Callable[[Recipe], Recipe | None], notes: list[str]) -> Finished | None:
    """The run of a recipe that this one's names; it may be gone, which does not touch what this one has come to."""
    try:
        recipe = find(run.recipe)
    except RecipeError as error:
        notes.append(f"note: the table lacks a row: {error}")
        return None
    return None if recipe is None else Finished.find(recipe, like=run.results)


def _teacher_of(recipe: Recipe) -> Recipe | None:
    """The recipe that has trained the teacher; None where it is not known, or makes another one."""
    trainer = trainer_of(recipe)
    if trainer is None or recipe.teacher is None:
        return None
    return trainer if trainer.run.path / "export" == Path(recipe.teacher.model) else None


def _rows(run: Finished, teacher: Finished | None, baseline: Finished | None) -> Iterator[Row]:
    for row in (*([] if teacher is None else [teacher.row("teacher")]), *_shuffled(teacher, "teacher")):
        if run.recipe.student.other_vocabulary:
            yield replace(row, ce=None, kl=None)  # of the teacher's own tokens
        else:
            yield row if row.steps is None else replace(row, kl=0.0)
    before = run.results["before"]
    if before is not None:
        yield Row(f"{_who(run.recipe)} before training", 0, None, before["ce_loss"], before.get("kl"))
    if baseline is not None:
        yield baseline.row(_label(baseline.recipe))
    yield run.row(_label(run.recipe))
    yield from _shuffled(run, _who(run.recipe))


def _shuffled(run: Finished | None, name: str) -> Iterator[Row]:
    """What is left when each question is asked about another case's picture, where the run has tried it."""
    found = run and run.results.get("shuffled_pictures")
    if found:
        yield Row(f"{name}, shuffled pictures", ce=found["ce"], right=found.get("accuracy"))


def _who(recipe: Recipe) -> str:
    """Who has no teacher is no student, such as the model that becomes one."""
    return "model" if recipe.teacher is None else "student"


def _label(recipe: Recipe) -> str:
    return "student, from the cache" if recipe.distils else f"{_who(recipe)}, labels alone"


def _meaning(run: Finished, teacher: Finished | None, baseline: Finished | None) -> Iterator[str]:
    """The comparison in words, for who does not read tables; there is none of two students that are not alike."""
    if teacher is not None and run.recipe.student.other_vocabulary:
        yield "The teacher's losses are of other tokens than the student's, and not beside them."
    compared = {"its teacher": teacher}
    if baseline is not None:
        others = differing_settings(run.recipe, baseline.recipe)
        is_alike = not any(key.startswith("student.") for key in others)
        if is_alike:
            compared["the other student"] = baseline
        own, other = run.loss("kl"), baseline.loss("kl")
        if is_alike and own and other and run.recipe.distils > baseline.recipe.distils:
            yield (
                f"Distance from the teacher (KL): {own:.3f} nats from the cache, {other:.3f} by labels alone, "
                f"{other / own:.1f} times that."
            )
        if run.results["step"] != baseline.results["step"]:
            yield f"The two students differ in steps: {run.results['step']} and {baseline.results['step']}."
        if others:
            yield from wrap(
                f"The two students also differ in {', '.join(others)}.", WIDTH, break_long_words=False
            )
    for name, other_run in compared.items():
        difference = None if other_run is None else _difference(run, other_run)
        if difference is not None:
            yield f"Short answers, against {name}: {_signed(difference)}"


def _difference(run: Finished, other: Finished) -> Interval | None:
    """How much more often the run is right, over the questions that both were asked."""
    own, theirs = run.answers(), other.answers()
    both = sorted(own.keys() & theirs.keys())
    return mean_interval([float(own[k][0]) - float(theirs[k][0]) for k in both], [own[k][1] for k in both])


def _signed(difference: Interval) -> str:
    low, high = (round(100 * value, 1) for value in (difference.low, difference.high))
    text = f"{100 * difference.mean:+.1f} points ({low:+.1f} to {high:+.1f}, {difference.count} questions)"
    return f"{text}, within the noise" if low <= 0 <= high else text


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
