"""Stage two, from beginning to end: read this file as the story of a training run.

    status = train(recipe, world, resume=False)       # on every rank

Inputs are opened and surveyed; the run's folder says whether the run begins or goes on; the student is built
and sharded; steps follow, with validations and checkpoints between them; what came out is exported, tried on
questions and written down.
"""

from __future__ import annotations

import click
from tqdm import tqdm

from shared.finished import run_is_finished
from shared.recipes import Recipe
from shared.runtime import World
from shared.stopping import INTERRUPTED_STATUS, StopRequest, command_to_go_on, stop_on_signals
from stage2_student.evaluation.summary import print_summary, summarize
from stage2_student.publishing.card import refresh_card, write_sources
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.identity import settings_of_rows
from stage2_student.runs.run_folder import RunFolder
from stage2_student.runs.tracking import open_trackers, require_trackers
from stage2_student.training.data_change import accept_data_change as accept
from stage2_student.training.export import choose_checkpoint, export_checkpoint, save_model_files
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.notes import notes_at_start
from stage2_student.training.resuming import Plan, plan_so_far, where_it_goes_on
from stage2_student.training.trainer import Trainer


def train(recipe: Recipe, world: World, *, resume: bool, accept_data_change: bool = False) -> int:
    """Runs, or goes on with, a training run; called by all ranks.  Returns the exit status.

    accept_data_change  go on although rows were mended, left out or added

    SIGTERM and Ctrl-C are noted from here to the end, and answered where all ranks can agree on it: between
    steps, and between the parts of the story.
    """
    folder = RunFolder(
        recipe.run.path,
        keep_checkpoints=recipe.run.keep_checkpoints,
        async_checkpoints=recipe.run.async_checkpoints,
    )
    if not resume and run_is_finished(recipe):
        if world.is_main:
            refresh_card(folder)  # not yet done where the process was killed after its results
            click.echo(
                f"run {recipe.run.path} is finished; to train another student, choose another run.name"
            )
            print_summary(recipe, folder.read_results() or {})
        return 0
    with stop_on_signals() as stop, folder.taken(world, resume=resume):
        return _train(recipe, folder, world, stop, accept_data_change=accept_data_change)


def _train(
    recipe: Recipe, folder: RunFolder, world: World, stop: StopRequest, *, accept_data_change: bool
) -> int:
    require_trackers(recipe.run)
    recipe.parallel.require_ranks(world.size)
    trainers = world.with_tensor(recipe.parallel.tensor)
    recipe = folder.as_it_began(recipe)
    inputs = open_inputs(recipe, trainers)
    recipe = recipe.of_day(inputs.processor.date).of_window(inputs.window)
    if stop.agreed(world):
        return stopped("nothing new is done; what was saved before is kept.", world)
    plan = Plan.of(recipe, num_examples=inputs.train.num_examples, layout=inputs.layout)
    before = plan_so_far(folder, num_examples=inputs.train.num_examples)
    checkpoint = folder.newest(
        inputs.identity(recipe),
        accept_data_change=accept_data_change,
        settings=settings_of_rows(None if before is None else before.recipe, recipe),
    )
    changes = [] if checkpoint is None else changed_rows(recipe, folder, checkpoint, inputs, world)
    results = folder.read_results()
    if results is not None and results["step"] >= plan.num_steps and not results.get("unanswered"):
        if world.is_main:
            if recipe.run.export and checkpoint is not None and not folder.export.exists():
                export_checkpoint(folder, checkpoint, folder.export)
            refresh_card(folder)  # not yet done where the process was killed after its results
            print_summary(recipe, results)
        return 0
    if checkpoint is None:
        folder.require_unfinished(results, num_steps=plan.num_steps)
    else:
        plan.require_no_shorter(checkpoint, where=f"run {recipe.run.path}")
    folder.begin(recipe, checkpoint, world)
    if world.is_main:
        click.echo(
            f"run {recipe.run.name}: {plan.num_steps} steps of {recipe.optimization.global_batch_size} examples, of "
            f"{inputs.train.num_examples}; everything about it in {folder.path}"
        )
        for line in where_it_goes_on(checkpoint, plan, before):
            tqdm.write(line)
        for line in changes:
            tqdm.write(f"data change: {line}")
        inputs.keep(folder, checkpoint, changes)
        save_model_files(recipe, folder)
        write_sources(folder, recipe, inputs.cache, inputs.train.keys)
        folder.write_hashes()
    with open_trackers(
        recipe, folder.path, world, step=checkpoint.facts.step if checkpoint else -1
    ) as trackers:
        trainer = Trainer(recipe, inputs, plan.shape, plan.num_steps, folder, trainers, trackers)
        if world.is_main:
            for note in notes_at_start(trainer.student.model, recipe, inputs.surveys().values()):
                tqdm.write(f"note: {note}")
        trainer.restore(checkpoint)
        trainer.check()
        finished = trainer.fit(stop)
        progress = trainer.where_it_stands()
    del trainer
    world.release_memory()  # before the export needs it
    if not finished or stop.agreed(world):
        return stopped(progress, world)
    if recipe.run.export and world.is_main:
        export_checkpoint(folder, choose_checkpoint(folder), folder.export)
    if stop.agreed(world):
        return stopped(progress, world)
    results = summarize(recipe, inputs, folder, world, step=plan.num_steps)
    if world.is_main:
        refresh_card(folder)  # the export was made before there were scores
        print_summary(recipe, results)
    return 0


def changed_rows(
    recipe: Recipe, folder: RunFolder, checkpoint: Checkpoint, inputs: Inputs, world: World
) -> list[str]:
    """What of the data differs from the checkpoint's, on all ranks; raises where that must not be accepted."""
    found = inputs.surveys(), inputs.cache, inputs.layout
    return world.by_main(lambda: accept(recipe, folder, checkpoint, *found))


def stopped(progress: str, world: World) -> int:
    """Says how to go on; returns the status of an interrupted run."""
    if world.is_main:
        tqdm.write(f"stopped: {progress} To go on: {command_to_go_on(resume=True)}")
    return INTERRUPTED_STATUS
