"""The recipes of all rounds, each a file that the ordinary commands take; made of the user's recipe.

ROOT/NAME                      the run of round 0, on the given answers
ROOT/NAME-round-1              the run of round 1
ROOT/NAME-rounds/round-0/train.yaml    what that run was
ROOT/NAME-rounds/round-1/
    write.yaml, answers/       how the student of round 0 writes, and what it wrote
    train.yaml                 the capture and the run: the given rows, with the student's own answers laid over some
    greedy-write.yaml, greedy/ how the student of round 1 answers held-out prompts, greedily, and what it said
    greedy.yaml, greedy.json   the teacher on these answers, in a cache of their own; CE and KL along them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.storage import LocalFolder
from shared.data.rows import open_split
from shared.errors import RecipeError, listed
from shared.recipes import Recipe, RoundsConfig, RunConfig, WriteConfig, load_recipe, recipe_text
from shared.same_prompts import prompt_date_of

# What decides the answers, of a `write` section, and what a run learns, of `optimization`: another one would leave
# answers and losses of a student that is no more.
OF_ANSWERS = (
    "splits",
    "prompts",
    "part",
    "steps",
    "temperature",
    "top_p",
    "per_prompt",
    "max_new_tokens",
    "seed",
)
OF_LENGTH = ("max_steps", "num_epochs", "schedule_part", "first_step")


@dataclass(frozen=True)
class Rounds:
    """recipe    the user's, with a ``rounds`` section
    num_rows  of the training split
    """

    recipe: Recipe
    num_rows: int

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Rounds:
        """Of a recipe whose data, and the cache of round 0, are there: all rounds ask as on the cache's day."""
        assert recipe.cache is not None
        day = recipe.data.date or prompt_date_of(recipe.cache.location)
        return cls(recipe.of_day(day), num_rows=len(open_split(recipe.data, "train")))

    @property
    def config(self) -> RoundsConfig:
        assert self.recipe.rounds is not None
        return self.recipe.rounds

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.root) / f"{self.recipe.run.name}-rounds"

    @property
    def num_prompts(self) -> int:
        """That are answered in each round, of the rows that it trains on."""
        config, (begin, end) = self.config, self.of(1).steps
        num_rows = min(self.num_rows, (end - begin) * self.recipe.optimization.global_batch_size)
        if config.own_share == 0:
            return 0
        if config.prompts is not None:
            return min(config.prompts, num_rows)
        if config.earlier == "keep":  # rows of earlier rounds come again in later ones after a whole pass
            return max(1, round(config.own_share * min(num_rows, self.num_rows / config.number)))
        return max(1, round(config.own_share * num_rows))

    @property
    def measures(self) -> bool:
        """Whether each round's student is asked held-out prompts."""
        return bool(self.recipe.evaluation.max_examples) and self.recipe.data.splits.validation is not None

    def of(self, number: int) -> Round:
        return Round(self, number)

    @property
    def all(self) -> list[Round]:
        """From round 0 on."""
        return [self.of(number) for number in range(self.config.number + 1)]


@dataclass(frozen=True)
class Round:
    """One round; round 0 is the ordinary run."""

    rounds: Rounds
    number: int

    @property
    def folder(self) -> Path:
        return self.rounds.folder / f"round-{self.number}"

    @property
    def before(self) -> Round:
        return Round(self.rounds, self.number - 1)

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return self._run.path

    @property
    def _run(self) -> RunConfig:
        run = self.rounds.recipe.run
        return run if self.number == 0 else run.model_copy(update={"name": f"{run.name}-round-{self.number}"})

    @property
    def train(self) -> Path:
        """The recipe of its capture and its run."""
        return self.folder / "train.yaml"

    @property
    def answers(self) -> Path:
        """What the student of the round before wrote."""
        return self.folder / "answers"

    @property
    def greedy(self) -> Path:
        """What this round's student answers to held-out prompts."""
        return self.folder / "greedy"

    @property
    def greedy_write(self) -> Path:
        """The recipe of these answers."""
        return self.folder / "greedy-write.yaml"

    @property
    def losses(self) -> Path:
        """CE and KL along these answers."""
        return self.folder / "greedy.json"

    @property
    def sets(self) -> list[Path]:
        """Folders of the answers that it trains on, the newest last."""
        if not self.rounds.num_prompts:
            return []
        first = 1 if self.rounds.config.earlier == "keep" else self.number
        return [self.rounds.of(number).answers for number in range(first, self.number + 1)]

    @property
    def _length(self) -> dict[str, Any]:
        epochs = self.rounds.config.round_epochs
        return {} if self.number == 0 or epochs is None else {"num_epochs": epochs, "max_steps": None}

    @property
    def steps(self) -> tuple[int, int]:
        """The first one of its run, and the first one of the next round's, in one order of the rows for all."""
        optimization = self.rounds.recipe.optimization
        begin = (optimization.first_step or 0) if self.number == 0 else self.before.steps[1]
        return begin, begin + optimization.model_copy(update=self._length).num_steps(self.rounds.num_rows)

    @property
    def training(self) -> Recipe:
        """Of its capture and its run."""
        recipe = self.rounds.recipe
        part: dict[str, Any] = {"schedule_part": schedule_part(recipe, self.number, self.run)}
        if self.number == 0:
            return _changed(recipe, optimization=part)
        config, written = self.rounds.config, tuple(str(folder.absolute()) for folder in self.sets)
        part["first_step"] = self.steps[0]
        rate = {} if config.round_learning_rate is None else {"learning_rate": config.round_learning_rate}
        return _changed(
            recipe.of_a_run(),
            data={"written": written or None},
            optimization=part | self._length | rate,
            student={"model": str(self.before.run / "export"), "revision": None, "init": "pretrained"},
            run={"name": self._run.name},
        )

    @property
    def writing(self) -> Recipe:
        """Of the answers that the student of the round before writes, to prompts that the round trains on.

        Where it trains on all rows, each round asks other ones, in turn.
        """
        config = self.rounds.recipe.write or WriteConfig()
        asked = {
            "path": None,
            "splits": ("train",),
            "prompts": self.rounds.num_prompts,
            "part": self.number - 1,
            "steps": self.steps,
        }
        return self.rounds.recipe.model_copy(
            update={"write": config.model_copy(update=asked), "rounds": None}
        )

    @property
    def greedy_writing(self) -> Recipe:
        """Of this round's student's answers to held-out prompts."""
        recipe = self.rounds.recipe
        asked = {
            "path": None,
            "splits": ("validation",),
            "prompts": recipe.evaluation.max_examples,
            "part": 0,
            "steps": None,
            "temperature": 0.0,
            "top_p": 1.0,
        }
        write = (recipe.write or WriteConfig()).model_copy(update=asked)
        return recipe.model_copy(update={"write": write, "rounds": None})

    @property
    def measuring(self) -> Recipe:
        """Of the teacher's targets along these answers, and of the losses; training's cache gets nothing of it."""
        recipe = self.rounds.recipe
        data = {"source": str(self.greedy.absolute()), "revision": None, "config": None, "limit": None}
        data["train_on"] = "last"  # the earlier answers of a conversation are given
        return _changed(
            recipe.of_a_run(),
            data=data,
            cache={"path": str((self.rounds.folder / "greedy-cache").absolute()), "splits": ("validation",)},
            loss=dict.fromkeys(("own_kd_ratio", "reverse_kl", "visual_weight", "positions"))
            | {"kd_ratio": 0.0},
            run={"name": f"{recipe.run.name}-round-{self.number}-greedy"},
            evaluation={"baseline": None},
        )


def schedule_part(recipe: Recipe, number: int, run: Path) -> tuple[float, float] | None:
    """Of the learning rate's schedule, for the run of a round; None: all of it.

    run  its folder: with a schedule for each round, a run that is there has the one that it has
    """
    rounds, optimization = recipe.rounds, recipe.optimization
    if rounds is None or not rounds.one_schedule:
        began = run / "recipe.yaml"
        return load_recipe(began).optimization.schedule_part if began.exists() else optimization.schedule_part
    length = 1.0  # of a later round, in lengths of round 0
    if rounds.round_epochs is not None and optimization.num_epochs is not None:
        length = rounds.round_epochs / optimization.num_epochs
    ends = [1 + later * length for later in range(rounds.number + 1)]
    return (0.0 if number == 0 else ends[number - 1] / ends[-1]), ends[number] / ends[-1]


def settings_of_round_0(recipe: Recipe) -> list[str]:
    """What its run has beside the user's settings.

    Raises   RecipeError  when the run is there, and is not round 0 of these rounds
    """
    first = Rounds(recipe, num_rows=0).of(0)
    part, given = first.training.optimization.schedule_part, recipe.optimization.schedule_part
    if given not in (None, part):
        raise RecipeError(
            "rounds.one_schedule beside optimization.schedule_part: the rounds set it. Leave one of both out"
        )
    there = first.run / "recipe.yaml"
    if there.exists() and load_recipe(there).optimization.schedule_part != part:
        raise RecipeError(
            f"{first.run}: this run's schedule is not the first part of one for all rounds. Choose another run.name, "
            "or go on from it with rounds.one_schedule: false, and each further round has a schedule of its own"
        )
    require_as_begun(first)
    return [] if part is None else [f"optimization.schedule_part={list(part)}"]


def require_as_begun(one: Round) -> None:
    """Raises   RecipeError  when a round was begun with another length, so that answers and losses would not fit"""
    if one.train.exists():
        _require_same(load_recipe(one.train), one.training, one.train)


def require_asked_alike(one: Round) -> None:
    """Raises   RecipeError  when its student was asked other held-out prompts, along which losses are others"""
    if one.greedy_write.exists():
        _require_same(load_recipe(one.greedy_write), one.greedy_writing, one.greedy_write)


def keep(recipe: Recipe, path: Path) -> Path:
    """Writes a round's recipe, also in place of one that differs in what changes no answers and no length.

    Raises   RecipeError  when the one that is there writes other answers, or trains for another length
    """
    if path.exists():
        _require_same(load_recipe(path), recipe, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    LocalFolder(path.parent).publish(path.name, recipe_text(recipe).encode())
    return path


def _require_same(there: Recipe, now: Recipe, path: Path) -> None:
    sections = [("write", OF_ANSWERS), ("optimization", OF_LENGTH)]
    differing = [
        f"{_set_by(section, name, now)}: {getattr(before, name)!r} there, {getattr(after, name)!r} now"
        for section, names in sections
        if (before := getattr(there, section)) is not None and (after := getattr(now, section)) is not None
        for name in names
        if getattr(before, name) != getattr(after, name)
    ]
    if differing:
        raise RecipeError(
            f"{path}: this round was begun otherwise:\n{listed(differing)}\nGive these back (they follow from "
            "rounds, write, optimization, evaluation and the number of rows), choose another run.name, or delete "
            f"{path.parent.parent} and the runs of its rounds"
        )


def _set_by(section: str, name: str, recipe: Recipe) -> str:
    """The user's own setting: how many held-out prompts are asked is no other than how many questions are."""
    is_held_out = recipe.write is not None and recipe.write.splits == ("validation",)
    return "evaluation.max_examples" if name == "prompts" and is_held_out else f"{section}.{name}"


def _changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with other values in some sections."""
    parts = {
        name: getattr(recipe, name).model_copy(update=update)
        for name, update in sections.items()
        if getattr(recipe, name) is not None
    }
    return recipe.model_copy(update=parts)
