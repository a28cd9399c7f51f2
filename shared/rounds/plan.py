"""The recipes of all rounds, each a file that the ordinary commands take; made of the user's recipe.

ROOT/NAME                      the run of round 0, on the given answers
ROOT/NAME-round-1              the run of round 1
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
from shared.recipes import Recipe, RoundsConfig, WriteConfig, load_recipe, recipe_text
from shared.same_prompts import prompt_date_of

# What decides the answers, of a `write` section.
OF_ANSWERS = ("splits", "prompts", "part", "temperature", "top_p", "per_prompt", "max_new_tokens", "seed")


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
        """That are answered in each round."""
        config = self.config
        if config.own_share == 0:
            return 0
        if config.prompts is not None:
            return min(config.prompts, self.num_rows)
        share = config.own_share / (config.number if config.earlier == "keep" else 1)
        return max(1, round(share * self.num_rows))

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
        return self.training.run.path

    @property
    def answers(self) -> Path:
        """What the student of the round before wrote."""
        return self.folder / "answers"

    @property
    def greedy(self) -> Path:
        """What this round's student answers to held-out prompts."""
        return self.folder / "greedy"

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
    def training(self) -> Recipe:
        """Of its capture and its run."""
        recipe = self.rounds.recipe
        part = {"schedule_part": schedule_part(recipe, self.number)}
        if self.number == 0:
            return _changed(recipe, optimization=part)
        config, written = self.rounds.config, tuple(str(folder.absolute()) for folder in self.sets)
        length = {} if config.round_epochs is None else {"num_epochs": config.round_epochs, "max_steps": None}
        rate = {} if config.round_learning_rate is None else {"learning_rate": config.round_learning_rate}
        return _changed(
            recipe.of_a_run(),
            data={"written": written or None},
            optimization=part | length | rate,
            student={"model": str(self.before.run / "export"), "revision": None, "init": "pretrained"},
            run={"name": f"{recipe.run.name}-round-{self.number}"},
        )

    @property
    def writing(self) -> Recipe:
        """Of the answers that the student of the round before writes: each round asks other prompts, in turn."""
        config = self.rounds.recipe.write or WriteConfig()
        asked = {
            "path": None,
            "splits": ("train",),
            "prompts": self.rounds.num_prompts,
            "part": self.number - 1,
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
        return _changed(
            recipe.of_a_run(),
            data=data,
            cache={"path": str((self.rounds.folder / "greedy-cache").absolute()), "splits": ("validation",)},
            loss={"kd_ratio": 0.0, "reverse_kl": None, "visual_weight": None, "positions": None},
            run={"name": f"{recipe.run.name}-round-{self.number}-greedy"},
            evaluation={"baseline": None},
        )


def schedule_part(recipe: Recipe, number: int) -> tuple[float, float] | None:
    """Of the learning rate's schedule, for the run of a round; None: all of it."""
    rounds, optimization = recipe.rounds, recipe.optimization
    if rounds is None or not rounds.one_schedule:
        return optimization.schedule_part
    length = 1.0  # of a later round, in lengths of round 0
    if rounds.round_epochs is not None and optimization.num_epochs is not None:
        length = rounds.round_epochs / optimization.num_epochs
    ends = [1 + later * length for later in range(rounds.number + 1)]
    return (0.0 if number == 0 else ends[number - 1] / ends[-1]), ends[number] / ends[-1]


def settings_of_round_0(recipe: Recipe) -> list[str]:
    """What its run has beside the user's settings.

    Raises   RecipeError  when the run is there, and has gone through another part of its schedule
    """
    part, given = schedule_part(recipe, 0), recipe.optimization.schedule_part
    if given not in (None, part):
        raise RecipeError(
            "rounds.one_schedule beside optimization.schedule_part: the rounds set it. Leave one of both out"
        )
    there = recipe.run.path / "recipe.yaml"
    began = load_recipe(there).optimization.schedule_part if there.exists() else part
    if began != part:
        raise RecipeError(
            f"{recipe.run.path}: this run's schedule is not the first part of one for all rounds. Choose another "
            "run.name, or go on from it with rounds.one_schedule: false, and each round has its own schedule"
        )
    return [] if part is None else [f"optimization.schedule_part={list(part)}"]


def keep(recipe: Recipe, path: Path) -> Path:
    """Writes a round's recipe where it is not there yet.

    Raises   RecipeError  when the one that is there writes other answers
    """
    if path.exists():
        there, now = load_recipe(path).write, recipe.write
        if there is not None and now is not None:
            differing = [
                f"write.{name}: {getattr(there, name)!r} there, {getattr(now, name)!r} now"
                for name in OF_ANSWERS
                if getattr(there, name) != getattr(now, name)
            ]
            if differing:
                raise RecipeError(
                    f"{path}: this round was begun otherwise:\n{listed(differing)}\nGive these back (they follow "
                    "from rounds, write and the number of rows), choose another run.name, or delete "
                    f"{path.parent.parent} and the runs of its rounds"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    LocalFolder(path.parent).publish(path.name, recipe_text(recipe).encode())
    return path


def _changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with other values in some sections."""
    parts = {
        name: getattr(recipe, name).model_copy(update=update)
        for name, update in sections.items()
        if getattr(recipe, name) is not None
    }
    return recipe.model_copy(update=parts)
