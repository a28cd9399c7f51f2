"""How good a student's answers are, and how far it is from its teacher: beside that, and itself before training.

    for one in evaluate(recipe, models(recipe, folder), world, split="test"):
        ...

Accuracy is over short references, where there is one way to say it; exact match, token F1 and ROUGE-L are over
all.  Intervals are over pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shared.errors import DataError, RecipeError, TeachonceError, is_out_of_memory
from shared.models.weight_files import read_provenance
from shared.places import require_no_typo
from shared.recipes import Recipe, Split
from shared.runtime import World
from stage2_student.evaluation.answer_metrics import Interval
from stage2_student.evaluation.answers import ModelSource, answers_of
from stage2_student.evaluation.evaluated import LABELS, STUDENT, TEACHER, UNTRAINED, Evaluated
from stage2_student.evaluation.model_losses import losses_of
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.survey import Survey

PATIENCE_S = 10.0  # between ranks that meet the same error


def default_split(recipe: Recipe) -> Split:
    return "validation" if recipe.data.splits.validation is not None else "train"


def models(recipe: Recipe, folder: str, *, references: bool) -> dict[str, ModelSource]:
    """The model to evaluate, and what to hold it against: its teacher, and the student before training."""
    found = {STUDENT: ModelSource.student(recipe, folder)}
    if references and recipe.teacher is not None:
        found[TEACHER] = ModelSource.teacher(recipe)
    if references and recipe.student.init == "pretrained":
        found[UNTRAINED] = ModelSource.untrained(recipe)
    return found


def evaluate(
    recipe: Recipe,
    sources: dict[str, ModelSource],
    world: World,
    *,
    split: Split,
    num_examples: int | None = None,
    found: Survey | None = None,
    shuffle_pictures: bool = False,
    answers: bool = True,
) -> Iterator[Evaluated]:
    """One model after the other over the same rows, some of the split's or all of them; called by all ranks.

    With ``shuffle_pictures`` each question is about the picture of another case.  Without ``answers`` none is asked:
    there are losses alone.  ``found`` are the examples that can be used, where they are known already.

    A reference that cannot be opened, or does not fit into memory, is left out, and said; where one rank alone has
    met that, its error ends all, as the others wait for it.

    Raises   TeachonceError  of the kind that fits, for the student; DataError for a split the data do not have
    """
    if getattr(recipe.data.splits, split) is None:
        raise DataError(f"{recipe.data.source}: the recipe names no {split} split (data.splits.{split})")
    asked: Any = {"split": split, "num_examples": num_examples, "shuffle_pictures": shuffle_pictures}
    asked["found"] = found
    for name, source in sources.items():
        try:
            said = answers_of(recipe, source, world, **asked) if answers else []
            losses = losses_of(recipe, source, world, **asked)
        except Exception as error:
            is_known = isinstance(error, TeachonceError) or is_out_of_memory(error)
            if not is_known or name == STUDENT or not world.meets(within_s=PATIENCE_S):
                raise
            if world.is_main:
                click.echo(f"note: {name} is left out: {error}", err=True)
        else:
            world.meets(within_s=PATIENCE_S)
            yield Evaluated(
                name,
                source.model,
                tuple(said),
                losses.ce,
                losses.kl,
                step=exported_step(source.model),
                by_teacher=losses.by_teacher,
                soft_ce=losses.soft_ce,
                by_row=losses.by_row,
            )
        world.release_memory()


def exported_step(model: str) -> int | None:
    """Of the run that the model was exported from, as its folder says; None where it does not."""
    step = (read_provenance(Path(model)) or {}).get("step")
    return step if type(step) is int else None


def show(found: Sequence[Evaluated]) -> None:
    """Tables for people: all questions, then each kind; losses alone where nothing was asked."""
    student = found[0]
    if not student.answers:
        click.echo(f"{'nats a position':<22}{'CE':>9}{'KL':>9}")
        for model in found:
            click.echo(f"{model.name:<22}{_losses(model)}")
        _show_soft(found)
        return
    for one in student.answers[:3]:
        click.echo(f"  {one.question}\n    reference: {one.reference}\n    answer:    {one.answer}")
    num_short = sum(one.is_short for one in student.answers)
    click.echo(
        f"{len(student.answers)} questions, {num_short} with short answers; 95 % intervals over pictures\n"
    )
    head = "".join(f"{label:>22}" for label in LABELS.values())
    click.echo(f"{'':<22}{head}{'CE':>9}{'KL':>9}")
    for model in found:
        click.echo(f"{model.name:<22}{_cells(model.intervals())}{_losses(model)}")
        for kind in model.kinds:
            click.echo(f"  {kind:<20}{_cells(model.intervals(kind))}")
        for line in _by_teacher(model):
            click.echo(line)
    _show_soft(found)
    for model in found:
        if model.num_cut:
            click.echo(cut_answers(model.name, model.num_cut, len(model.answers)))


def _show_soft(found: Sequence[Evaluated]) -> None:
    """Of models whose tokenizer is not their teacher's."""
    for model in found:
        if model.soft_ce is not None:
            told = f"{model.soft_ce:.4f} at shared positions (docs/other-tokenizers.md)"
            click.echo(f"{model.name}: cross-entropy with the teacher {told}")


def _losses(model: Evaluated) -> str:
    return "".join(f"{'-' if value is None else f'{value:.4f}':>9}" for value in (model.ce, model.kl))


def _by_teacher(model: Evaluated) -> Iterator[str]:
    """CE and KL over the positions whose targets are of each teacher, where there are several."""
    found = model.by_teacher
    nothing = [None] * len(found.get("names", ()))
    columns = [found.get(column, nothing) for column in ("names", "positions", "ce", "kl")]
    for name, positions, *losses in zip(*columns, strict=True):
        told = "".join(f"{'-' if one is None else f'{one:.4f}':>9}" for one in losses)
        yield f"  {f'{positions} positions of {name}':<{20 + 22 * len(LABELS)}}{told}"


def cut_answers(name: str, num_cut: int, num_answers: int) -> str:
    return (
        f"note: {num_cut} of {num_answers} answers of {name} were cut at evaluation.max_new_tokens and may count as "
        "wrong for that; allow more of them"
    )


def _cells(intervals: dict[str, Interval | None]) -> str:
    return "".join(f"{'-' if one is None else one.text():>22}" for one in intervals.values())


@dataclass(frozen=True)
class Subject:
    """What ``evaluate`` was asked about: a recipe, a model, and a run's folder if it is that run's own student."""

    recipe: Recipe
    model: str
    run: Path | None

    @classmethod
    def find(
        cls, what: str, *, recipe: Callable[[str], Recipe], given: str | None, model: Path | None
    ) -> Subject:
        """``what`` is a run's folder, a recipe, or a model's folder or Hub name (then ``given`` is the recipe).

        Raises   RecipeError  when it is none of these, or a model without a recipe
        """
        path = Path(what)
        if (path / "recipe.yaml").exists():
            return cls._of_run(recipe(given or str(path / "recipe.yaml")), path, model)
        is_model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
        if is_model and given is None:
            raise RecipeError(f"{what}: a model's folder; say which data it is to be asked: --recipe")
        if given is not None and (is_model or not path.exists()):
            if model is not None:
                raise RecipeError(f"{what} is a model already; --model {model} goes with a run or a recipe")
            return cls(recipe(given), what, None)
        try:
            loaded = recipe(what)
        except RecipeError as error:
            if path.is_dir():
                raise RecipeError(
                    f"{what}: neither a run (no recipe.yaml) nor a model (no config.json)"
                ) from error
            require_no_typo(what, what=f"run, model or recipe {what}", error=RecipeError)
            if "/" in what and not path.exists():
                raise RecipeError(f"{what}: there is no run, model or recipe of that name") from error
            raise
        return cls._of_run(loaded, loaded.run.path, model)

    @classmethod
    def _of_run(cls, recipe: Recipe, run: Path, model: Path | None) -> Subject:
        if model is not None:
            return cls(recipe, str(model), None)
        RunFolder(run).require_as_written()
        if not (run / "export").is_dir():
            raise RecipeError(f"{run}: no export in it to evaluate. `train-student export {run}` makes one")
        return cls(recipe, str(run / "export"), run)
