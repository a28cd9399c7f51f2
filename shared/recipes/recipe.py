"""Recipes: one YAML file that describes a whole experiment, read strictly by both stages.

    recipe = load_recipe("phantom", overrides=["loss.kd_ratio=1.0", "run.name=soft"])

A recipe is a tree of frozen pydantic models, one a section; each part of the program is built from its own
section.  Unknown keys, wrong types and impossible combinations are all collected and shown at once.

Types are strict (``max_steps: true`` is not 1) and the YAML is read as YAML 1.2 reads it where 1.1 surprises:
``5e-5`` is a number, ``no`` is a word, and a key given twice is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from shared.errors import RecipeError
from shared.recipes import yaml12
from shared.recipes.files import read_recipe_tree, validate_tree
from shared.recipes.policies import (
    TAILS_OF_ANOTHER_VOCABULARY,
    ghost_of_several,
    tail_of_another_vocabulary,
)
from shared.recipes.schema import Section
from shared.recipes.sections import (
    BootstrapConfig,
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimizationConfig,
    ParallelConfig,
    RoundsConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    WriteConfig,
)

# Those in which a run and its baseline are to differ.
SETTINGS_OF_A_RUN_ALONE = (
    *("loss.", "loss=", "run.name=", "run=", "evaluation.baseline=", "evaluation="),
    *("rounds.", "rounds=", "write.", "write=", "optimization.schedule_part=", "optimization.first_step="),
)


class Recipe(Section):
    """A whole experiment."""

    bootstrap: BootstrapConfig = BootstrapConfig()
    data: DataConfig
    teacher: TeacherConfig | None = None
    cache: CacheConfig | None = None
    student: StudentConfig
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    write: WriteConfig | None = None
    rounds: RoundsConfig | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = []
        if self.loss.kd_ratio > 0 and self.cache is None:
            problems.append("loss.kd_ratio above 0 needs a cache section; kd_ratio 0 is plain fine-tuning")
        if self.cache is not None:
            wanted = [name for name in ("train", "validation") if getattr(self.data.splits, name) is not None]
            lacking = [name for name in wanted if name not in self.cache.splits]
            if lacking and self.loss.kd_ratio > 0:
                problems.append(f"cache.splits lacks {', '.join(lacking)}, which the student needs")
            if len(set(self.cache.splits)) != len(self.cache.splits):
                problems.append("cache.splits names a split twice")
        if self.loss.visual_weight:
            problems += self._problems_of_a_visual_weight()
        if self.cache is not None and self.teacher is None and not self.cache.has_many_teachers:
            problems.append("a cache section needs a teacher section: it says whose targets the cache holds")
        if self.cache is not None:
            if self.loss.kd_ratio > 0 and self.loss.temperature not in self.cache.temperatures:
                captured = ", ".join(map(str, self.cache.temperatures))
                problems.append(
                    f"loss.temperature {self.loss.temperature} is not among cache.temperatures ({captured}); "
                    "add it there and capture again, or use a captured one"
                )
            if self.cache.policy.is_sampled and self.loss.tail is not None:
                problems.append(
                    f"loss.tail is for top_k and top_p caches; {self.cache.policy.kind} targets have no tail"
                )
            if self.cache.mix and self.tail == "ghost":
                problems.append(ghost_of_several(self.cache.policy.kind))
        if self.loss.reverse_kl is not None:
            problems += self._problems_of_reverse_kl()
        if self.cache is not None and self.student.other_vocabulary:
            problems += self._problems_of_another_vocabulary(self.cache)
        if self.write is not None and (self.write.max_new_tokens or 0) > self.data.max_answer_tokens:
            problems.append(
                f"write.max_new_tokens {self.write.max_new_tokens} is above data.max_answer_tokens "
                f"{self.data.max_answer_tokens}: what is beyond would not be learned. Lower it, or raise the other"
            )
        if self.parallel.is_split:
            problems += self._problems_of_a_split()
        if self.rounds is not None:
            problems += self._problems_of_rounds()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems_of_a_visual_weight(self) -> list[str]:
        if self.loss.kd_ratio == 0:
            return [
                "loss.visual_weight beside loss.kd_ratio 0: by labels alone training reads no cache, which tells "
                "what pictures gave. Set kd_ratio above 0, or leave visual_weight out"
            ]
        if self.cache is not None and self.cache.visual_gain is None:
            return [
                "loss.visual_weight needs a cache that tells what pictures gave. Set cache.visual_gain to blurred or "
                "removed and capture again, or leave visual_weight out"
            ]
        if self.loss.reverse_kl is not None:
            return [
                "loss.visual_weight beside loss.reverse_kl: weights that depend on the drawn token change what its "
                "average is of. Leave one of them out"
            ]
        return []

    def _problems_of_reverse_kl(self) -> list[str]:
        problems = []
        if self.loss.kd_ratio == 0 or self.cache is None or not self.cache.label_log_prob:
            problems.append(
                "loss.reverse_kl needs the teacher's log-prob of each written token: set cache.label_log_prob to "
                "true, and kd_ratio above 0"
            )
        if self.cache is not None and self.cache.mix:
            problems.append(
                "loss.reverse_kl beside cache.mix: the log of a mean is no mean of logs. Leave one of them out"
            )
        write = self.write or WriteConfig()
        if self.rounds is not None and (write.temperature, write.top_p) != (1.0, 1.0):
            problems.append(
                f"loss.reverse_kl in rounds with write.temperature {write.temperature:g} and top_p {write.top_p:g}: "
                "its rows must be samples of the student. Set both to 1"
            )
        return problems

    def _problems_of_rounds(self) -> list[str]:
        problems = []
        if self.cache is not None and not self.cache.is_one:
            problems.append("rounds beside several caches: a round adds to one. Name one cache as cache.path")
        if self.loss.kd_ratio == 0:
            problems.append(
                "rounds with loss.kd_ratio 0: a student's own answers teach by what the teacher says of them. Set "
                "kd_ratio above 0"
            )
        if not self.run.export:
            problems.append(
                "rounds with run.export false: each round begins from the export before. Set it to true"
            )
        if self.write is not None and self.write.per_prompt > 1:
            problems.append(
                f"rounds with write.per_prompt {self.write.per_prompt}: a row learns one answer. Set it to 1"
            )
        if self.rounds is not None and self.rounds.one_schedule:
            problems += self._problems_of_one_schedule(self.rounds)
        if self.data.written is not None:
            problems.append("rounds beside data.written: the rounds set it. Leave it out")
        return problems

    def _problems_of_one_schedule(self, rounds: RoundsConfig) -> list[str]:
        problems = []
        if rounds.round_learning_rate is not None:
            problems.append(
                "rounds.one_schedule beside rounds.round_learning_rate: one schedule decides it for all rounds. Set "
                "one_schedule to false, or leave round_learning_rate out"
            )
        if rounds.round_epochs is not None and self.optimization.num_epochs is None:
            problems.append(
                "rounds.one_schedule with rounds.round_epochs: give round 0's length as optimization.num_epochs, too"
            )
        return problems

    def _problems_of_another_vocabulary(self, cache: CacheConfig) -> list[str]:
        problems = []
        if self.teacher is None and cache.has_many_teachers:
            problems.append(
                "student.other_vocabulary needs a teacher section: rows of the cache are known by its tokenizer and "
                "chat template. Name one of the caches' teachers"
            )
        if self.loss.reverse_kl is not None or self.rounds is not None:
            problems.append(
                "student.other_vocabulary beside loss.reverse_kl or rounds: a student's own answers are token ids, "
                "which its teacher's tokenizer does not have. Leave one of them out"
            )
        if self.loss.own_kd_ratio is not None:
            problems.append(
                "student.other_vocabulary beside loss.own_kd_ratio: where the two tokenizers share no boundary the "
                "label is the target, so a student's own answers would be labels after all. Leave one of them out"
            )
        if self.loss.visual_weight is not None or self.loss.positions is not None:
            problems.append(
                "student.other_vocabulary beside loss.visual_weight or loss.positions: what these weigh are "
                "positions of the teacher, and the student's are others. Leave one of them out"
            )
        if self.tail is not None and self.tail not in TAILS_OF_ANOTHER_VOCABULARY:
            problems.append(tail_of_another_vocabulary(cache.policy.kind, self.tail))
        return problems

    def _problems_of_a_split(self) -> list[str]:
        problems = []
        if self.student.compile:
            problems.append(
                "student.compile beside parallel.tensor or parallel.expert: layers that are split among ranks are "
                "not compiled. Leave one of them out"
            )
        if self.student.lora is not None and self.student.lora.target_parameters is not None:
            problems.append(
                "student.lora.target_parameters beside parallel.tensor or parallel.expert: adapters of split "
                "parameters are not supported, those of linear layers are. Leave one of them out"
            )
        return problems

    def of_day(self, date: str | None) -> Recipe:
        """The same, its prompts written for that day; None: as it is."""
        if date is None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"date": date})})

    def of_a_run(self) -> Recipe:
        """The same without what is for other commands than a run's."""
        return self.model_copy(update={"write": None, "rounds": None})

    def of_window(self, shards: int) -> Recipe:
        """The same, its cache read so many shards at a time."""
        if self.cache is None:
            return self
        return self.model_copy(update={"cache": self.cache.model_copy(update={"shuffle_window": shards})})

    def as_it_began(self, began: Recipe) -> Recipe:
        """With what a run chose at its beginning, unless given: the day of its prompts, the window of its order, and
        the part of its schedule as round 0.
        """
        recipe = self.of_day(began.data.date) if self.data.date is None else self
        if self.rounds is not None and self.optimization.schedule_part is None:
            part = {"schedule_part": began.optimization.schedule_part}
            recipe = recipe.model_copy(update={"optimization": self.optimization.model_copy(update=part)})
        if self.cache is None or began.cache is None or self.cache.shuffle_window != "auto":
            return recipe
        chosen = began.cache.shuffle_window
        return recipe if chosen == "auto" else recipe.of_window(chosen)

    @property
    def tail(self) -> str | None:
        """Where the loss puts the mass that targets leave out; None where they leave none, or there are none."""
        if self.cache is None or self.cache.policy.is_sampled:
            return None
        return self.loss.tail_mode

    @property
    def distils(self) -> bool:
        """Whether stage two needs the cache."""
        return self.loss.kd_ratio > 0


def load_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe of that name (of those that come with the package) or file.

    Raises   RecipeError  when the file is missing or is not YAML, and for all its problems at once.
    """
    tree, origin = read_recipe_tree(name_or_path, overrides, Recipe)
    return validate_tree(Recipe, tree, origin=origin)


def trainer_of(recipe: Recipe) -> Recipe | None:
    """The recipe that trains the teacher; None where none of ours does.

    Raises   RecipeError  as ``load_recipe`` does
    """
    if recipe.teacher is None or recipe.teacher.trained_by is None:
        return None
    return _load_named("teacher.trained_by", recipe.teacher.trained_by)


def baseline_of(
    recipe: Recipe, overrides: Sequence[str] = (), *, tell: Callable[[str], None] = lambda note: None
) -> Recipe | None:
    """The recipe of the run that this one's is compared with, under the same root; None where there is no other run.

    A run on other data is none to compare with: a recipe of one's own that extends another inherits its baseline.  Of
    one that has begun, the data are those it was begun with.

    overrides  of this recipe, of which the baseline has its part
    tell       is told of a run on other data
    Raises   RecipeError  as ``load_recipe`` does
    """
    name = recipe.evaluation.baseline
    if name is None:
        return None
    root = f"run.root={json.dumps(recipe.run.root)}"
    settings = [*settings_of_baseline(recipe, overrides), root]
    found = _load_named("evaluation.baseline", name, overrides=settings)
    if found.run.name == recipe.run.name:
        return None
    source = _as_it_began(found).data.source
    if os.path.realpath(source) != os.path.realpath(recipe.data.source):
        tell(
            f"evaluation.baseline {name} is not compared with: its data are {source}, and this run's "
            f"{recipe.data.source}. Name a run on these data, or null"
        )
        return None
    return found


def settings_of_baseline(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """Those of a run's overrides that its baseline shares: all but what the two are to differ in, and what its recipe
    has no section for.

    Raises   RecipeError  as ``load_recipe`` does
    """
    if recipe.evaluation.baseline is None or not overrides:
        return []
    baseline = _load_named("evaluation.baseline", recipe.evaluation.baseline)
    lacking = [name for name in ("cache", "teacher") if getattr(baseline, name) is None]
    own = (*SETTINGS_OF_A_RUN_ALONE, *(f"{name}{mark}" for name in lacking for mark in ".="))
    return [item for item in overrides if not item.startswith(own)]


def _as_it_began(recipe: Recipe) -> Recipe:
    """As the recipe's run has kept it; the same where there is none, or it cannot be read."""
    kept = recipe.run.path / "recipe.yaml"
    try:
        return load_recipe(kept) if kept.exists() else recipe
    except (OSError, RecipeError):
        return recipe


def _load_named(setting: str, name: str, *, overrides: Sequence[str] = ()) -> Recipe:
    try:
        return load_recipe(name, overrides=overrides)
    except RecipeError as error:
        raise RecipeError(f"{setting} (a file is looked for in the current folder): {error}") from error


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, every default written out, as plain JSON types."""
    return recipe.model_dump(mode="json")


def recipe_text(recipe: Recipe, *, allow_unicode: bool = True) -> str:
    """The resolved recipe as YAML that loads to the same recipe.

    allow_unicode  as it is, not as escapes
    """
    return yaml12.dump(dump_recipe(recipe), allow_unicode=allow_unicode)
