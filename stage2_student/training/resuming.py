"""What ``--resume`` says before it trains: where it goes on, and how the schedule differs from the one so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shared.errors import CheckpointError, RecipeError
from shared.recipes import Recipe, load_recipe
from shared.shard_order import ShardLayout
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.optim import learning_rate
from stage2_student.training.order import StepShape, step_shape, total_steps


@dataclass(frozen=True)
class Plan:
    """How long a run is to be."""

    recipe: Recipe
    shape: StepShape
    num_steps: int

    @classmethod
    def of(cls, recipe: Recipe, *, num_examples: int, layout: ShardLayout | None = None) -> Plan:
        shape = step_shape(recipe, num_examples, layout)
        return cls(recipe, shape, total_steps(recipe, shape))

    def require_no_shorter(self, checkpoint: Checkpoint, *, where: str) -> None:
        """Raises   CheckpointError  when more steps are done than the run is to have"""
        done = checkpoint.facts.step
        if done > self.num_steps:
            raise CheckpointError(
                f"{where}: {done} steps are done, {self.num_steps} are asked for. Ask for at least as many "
                "(optimization.max_steps, num_epochs), or choose another run.name"
            )

    def epochs(self, steps: int) -> float:
        return steps / self.shape.num_steps_per_epoch

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.recipe.optimization, step=step, num_steps=self.num_steps)


def plan_so_far(folder: RunFolder, *, num_examples: int) -> Plan | None:
    """As the run's folder has it; None of a new run, and of a recipe that this version cannot read."""
    if not folder.recipe.exists():
        return None
    try:
        return Plan.of(load_recipe(folder.recipe), num_examples=num_examples)
    except RecipeError:
        return None


def where_it_goes_on(checkpoint: Checkpoint | None, plan: Plan, before: Plan | None) -> Iterator[str]:
    """Lines for people; none about a new run."""
    if checkpoint is None:
        if before is not None:
            yield "there is no checkpoint yet: the run begins with its first step"
        return
    step = checkpoint.facts.step
    yield (
        f"goes on from {checkpoint.path}: {step} of {plan.num_steps} steps are done, "
        f"{plan.epochs(step):.2f} of {plan.epochs(plan.num_steps):.2f} epochs"
    )
    if before is None or before.num_steps == plan.num_steps:
        return
    rates = before.learning_rate(step), plan.learning_rate(step)
    changed = "stays" if rates[0] == rates[1] else f"would have been {rates[0]:.3g} and is"
    yield (
        f"note: the run was planned for {before.num_steps} steps, and is for {plan.num_steps} now: the learning "
        f"rate of step {step + 1} {changed} {rates[1]:.3g} ({plan.recipe.optimization.schedule} schedule)"
    )
