"""Stage two, from beginning to end: read this file as the story of a training run.

    status = train(recipe, world, resume=False)       # on every rank

Inputs are opened and surveyed; the run's folder says whether the run begins or goes on; the student is built
and sharded; steps follow, with validations and checkpoints between them; what came out is exported, tried on
questions and written down.
"""

from __future__ import annotations

import click

from shared.errors import RecipeError
from shared.recipes import Recipe
from shared.runtime import INTERRUPTED_STATUS, StopRequest, World, stop_on_sigterm
from shared.survey import run_is_finished
from stage2_student.evaluation.summary import print_summary, summarize
from stage2_student.publishing.card import refresh_card, write_sources
from stage2_student.runs.run_folder import RunFolder
from stage2_student.runs.tracking import open_trackers, require_trackers
from stage2_student.training.export import choose_checkpoint, export_checkpoint, save_model_files
from stage2_student.training.inputs import open_inputs
from stage2_student.training.order import StepShape
from stage2_student.training.trainer import Trainer


def train(recipe: Recipe, world: World, *, resume: bool) -> int:
    """Runs, or goes on with, a training run; called by all ranks.  Returns the exit status.

    SIGTERM is noted from here to the end, and answered where all ranks can agree on it: between steps, and
    between the parts of the story.
    """
    folder = RunFolder(
        recipe.run.path,
        keep_checkpoints=recipe.run.keep_checkpoints,
        async_checkpoints=recipe.run.async_checkpoints,
    )
    if not resume and run_is_finished(recipe):
        if world.is_main:
            click.echo(
                f"run {recipe.run.path} is finished; to train another student, choose another run.name"
            )
            print_summary(folder.read_results() or {})
        return 0
    with stop_on_sigterm() as stop, folder.taken(world, resume=resume):
        return _train(recipe, folder, world, stop)


def _train(recipe: Recipe, folder: RunFolder, world: World, stop: StopRequest) -> int:
    require_even_ranks(recipe, world.size)
    require_trackers(recipe.run)
    inputs = open_inputs(recipe, world)
    if stop.agreed(world):
        return INTERRUPTED_STATUS
    shape = step_shape(recipe, inputs.train.num_examples)
    num_steps = total_steps(recipe, shape)
    checkpoint = folder.newest(inputs.identity(recipe))
    results = folder.read_results()
    if results is not None and results["step"] >= num_steps:
        if world.is_main:
            if recipe.run.export and checkpoint is not None and not folder.export.exists():
                export_checkpoint(folder, checkpoint, folder.export)
            refresh_card(folder)  # not yet done where the process was killed after its results
            print_summary(recipe, results)
        return 0
    if checkpoint is None:
        folder.require_unfinished(results, num_steps=num_steps)
    folder.begin(recipe, checkpoint, world)
    if world.is_main:
        click.echo(
            f"run {recipe.run.name}: {num_steps} steps of {recipe.optimization.global_batch_size} examples, of "
            f"{inputs.train.num_examples}; everything about it in {folder.path}"
        )
        save_model_files(recipe, folder)
        write_sources(folder, recipe, inputs.cache)
    with open_trackers(
        recipe, folder.path, world, step=checkpoint.facts.step if checkpoint else -1
    ) as trackers:
        trainer = Trainer(recipe, inputs, shape, num_steps, folder, world, trackers)
        trainer.restore(checkpoint)
        trainer.check()
        finished = trainer.fit(stop)
    del trainer
    world.release_memory()  # before the export needs it
    if not finished or stop.agreed(world):
        return INTERRUPTED_STATUS
    if recipe.run.export and world.is_main:
        export_checkpoint(folder, choose_checkpoint(folder), folder.export)
    if stop.agreed(world):
        return INTERRUPTED_STATUS
    world.barrier()
    results = summarize(recipe, inputs, folder, world, step=num_steps)
    if world.is_main:
        refresh_card(folder)  # the export was made before there were scores
        print_summary(recipe, results)
    return 0


def require_even_ranks(recipe: Recipe, num_ranks: int) -> int:
    """Rounds of microbatches in a step: the global batch is microbatch x rounds x ranks.

    Raises   RecipeError  when it is not, and some ranks would wait in each step
    """
    config = recipe.optimization
    rounds, rest = divmod(config.global_batch_size, config.microbatch_size * num_ranks)
    if rest:
        raise RecipeError(
            f"optimization.global_batch_size {config.global_batch_size} is not a multiple of microbatch_size "
            f"{config.microbatch_size} times {num_ranks} ranks. Change one of them, or the number of processes"
        )
    return rounds


def step_shape(recipe: Recipe, num_examples: int) -> StepShape:
    return StepShape(
        num_examples=num_examples,
        global_batch_size=recipe.optimization.global_batch_size,
        microbatch_size=recipe.optimization.microbatch_size,
        seed=recipe.run.seed,
    )


def total_steps(recipe: Recipe, shape: StepShape) -> int:
    if recipe.optimization.max_steps is not None:
        return recipe.optimization.max_steps
    assert recipe.optimization.num_epochs is not None  # the recipe has one of the two
    return max(1, round(recipe.optimization.num_epochs * shape.num_steps_per_epoch))
