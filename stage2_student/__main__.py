"""The command line of stage two: ``train-student``, or ``python -m stage2_student`` (under torchrun for more
than one process)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.cli import (
    FILE,
    FOLDER,
    PAGE,
    PATH,
    PLACE,
    load_recipe,
    recipe_arguments,
    require_resume,
    resume_options,
    screen_has_unicode,
    version_option,
)
from shared.cli import run as run_group
from shared.library_output import keep_library_output, quiet_libraries
from shared.stopping import INTERRUPTED_STATUS, command_to_go_on

if TYPE_CHECKING:
    from shared.recipes import Split

SOMETHING_ELSE = "a file with something else is there. Name another one, or delete it"


@click.group()
@version_option
def commands() -> None:
    """Train a student from a teacher's cache."""


@commands.command("run")
@recipe_arguments
@resume_options
def run(recipe: str, overrides: tuple[str, ...], resume: bool, accept_data_change: bool) -> int:
    """Train the student of RECIPE; from the cache, unless loss.kd_ratio is 0."""
    from shared.runtime import distributed
    from stage2_student.train import train

    require_resume(resume, accept_data_change)
    loaded = load_recipe(recipe, overrides=overrides)
    with distributed(collective_timeout_s=loaded.parallel.collective_timeout_s) as world:
        return train(loaded, world, resume=resume, accept_data_change=accept_data_change)


@commands.command("check")
@recipe_arguments
@click.option(
    "--nproc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes to plan for."
)
def check(recipe: str, overrides: tuple[str, ...], nproc: int) -> int:
    """Say what RECIPE would do and what it would take, and everything that is wrong with it."""
    from stage2_student.check import check_recipe

    return check_recipe(load_recipe(recipe, overrides=overrides), num_ranks=nproc).show()


@commands.command("recipe")
@recipe_arguments
def recipe(recipe: str, overrides: tuple[str, ...]) -> int:
    """Print RECIPE as YAML, with every default written out."""
    from shared.recipes import recipe_text

    loaded = load_recipe(recipe, overrides=overrides)
    click.echo(recipe_text(loaded, allow_unicode=screen_has_unicode()), nl=False)
    return 0


@commands.command("evaluate")
@click.argument("what", metavar="RUN|MODEL|RECIPE", type=PLACE)
@click.option(
    "--recipe", help="Whose data and settings to take; a run has its own, a model's folder needs one."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe."
)
@click.option("--model", type=PATH, help="Folder to evaluate; the run's export by default.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Validation by default.")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    help="So many, spread over the split; as the recipe says by default.",
)
@click.option("--shuffle-pictures", is_flag=True, help="Ask each question about the picture of another case.")
@click.option("--references/--no-references", default=True, help="Teacher and untrained student beside it.")
@click.option(
    "--answers/--no-answers", default=True, help="Ask the questions as well; without, CE and KL alone."
)
@click.option(
    "--out",
    type=FILE,
    help="Parquet file (without answers: JSON); in RUN/evaluation for a run's own student.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def evaluate(
    what: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    model: Path | None,
    split: Split | None,
    examples: int | None,
    shuffle_pictures: bool,
    references: bool,
    answers: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Let a trained student answer questions, beside its teacher and itself before training."""
    from shared.preflight import require_writable
    from shared.runtime import distributed
    from stage2_student.evaluation import evaluate as evaluation
    from stage2_student.evaluation.evaluated import Evaluated
    from stage2_student.evaluation.scores import in_the_way, keep, save
    from stage2_student.publishing.card import refresh_card
    from stage2_student.runs.files import finite
    from stage2_student.runs.run_folder import SHUFFLED, RunFolder, is_evaluation_of_a_run

    if out is not None and answers and out.suffix != ".parquet":
        raise click.UsageError(f"--out {out}: name a .parquet file; the scores go into the .json beside it")
    if out is not None and not answers and out.suffix != ".json":
        raise click.UsageError(f"--out {out}: name a .json file; without answers there are scores alone")
    if out is not None and is_evaluation_of_a_run(out.parent):
        raise click.UsageError(
            f"--out {out}: a run keeps its own answers there. Leave --out away for them, or name another folder"
        )
    if out is not None and (other := in_the_way(out)) is not None:
        raise click.UsageError(f"{other}: {SOMETHING_ELSE}")
    subject = evaluation.Subject.find(
        what, recipe=lambda name: load_recipe(name, overrides=overrides), given=recipe, model=model
    )
    asked = split or evaluation.default_split(subject.recipe)
    found: list[Evaluated] = []
    if subject.run is not None:
        keep_library_output(RunFolder(subject.run).log)
    saved = out
    keeps = subject.run is not None and answers and out is None  # losses alone take no place of answers
    # Never taken for what the student answers to its own pictures.
    name = f"{SHUFFLED}{asked}" if shuffle_pictures else asked
    place = out.parent if out is not None else subject.run / "evaluation" if subject.run and keeps else None
    if place is not None:  # not only when the answers are there
        require_writable(place, what="predictions, into")
    with distributed(collective_timeout_s=subject.recipe.parallel.collective_timeout_s) as world:
        for one in evaluation.evaluate(
            subject.recipe,
            evaluation.models(subject.recipe, subject.model, references=references),
            world,
            split=asked,
            num_examples=examples or subject.recipe.evaluation.max_examples or None,
            shuffle_pictures=shuffle_pictures,
            answers=answers,
        ):
            found.append(one)
            if world.is_main:  # after each: another one may take long, or all memory
                if out is not None:
                    save(found, out)
                elif subject.run is not None and keeps:
                    saved = keep(found, subject.run / "evaluation", name)
        if world.is_main:
            if subject.run is not None and keeps:
                refresh_card(RunFolder(subject.run))
            if as_json:
                click.echo(json.dumps(finite([one.to_json() for one in found]), indent=1))
            else:
                evaluation.show(found)
                if saved is not None:
                    click.echo(f"\n{'predictions' if answers else 'scores'}: {saved}")
    return 0


@commands.command("sweep")
@recipe_arguments
@click.option(
    "--grid",
    multiple=True,
    required=True,
    metavar="SECTION.KEY=A,B,...",
    help="Values to try; several grids are combined.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at once; by default one for each GPU, or one at a time without.",
)
def sweep(recipe: str, overrides: tuple[str, ...], grid: tuple[str, ...], jobs: int | None) -> int:
    """Train a student of RECIPE for every combination of the grid; the same command goes on with the rest."""
    from stage2_student.evaluation.compare import legend, table, table_by_teacher
    from stage2_student.evaluation.run_records import read_runs
    from stage2_student.sweep import plan_jobs
    from stage2_student.sweep import sweep as run_sweep

    planned = plan_jobs(recipe, overrides, grid)
    outcome = run_sweep(planned, num_parallel=jobs)
    finished = [job.plan.run.path for job in planned if outcome.statuses[job.name] == 0]
    if finished:
        runs = read_runs(finished)
        click.echo("\n".join([*table(runs), *legend(runs), *table_by_teacher(runs)]))
    if outcome.status == INTERRUPTED_STATUS:
        click.echo(f"stopped. To go on: {command_to_go_on(resume=False)}")
    if outcome.failed:
        click.echo(f"{len(outcome.failed)} of {len(planned)} failed: {', '.join(outcome.failed)}", err=True)
    return outcome.status


@commands.command("compare")
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--json", "json_path", type=FILE, help="File for programs.")
@click.option("--plots", type=FOLDER, help="Folder for curves (extra `report`).")
def compare(runs: tuple[Path, ...], json_path: Path | None, plots: Path | None) -> int:
    """Show RUNS, folders of runs, side by side, and when their cache has paid."""
    from shared.regular_files import is_another_file
    from stage2_student.evaluation.cache_uses import cache_uses
    from stage2_student.evaluation.compare import is_comparison, legend, save, table, table_by_teacher
    from stage2_student.evaluation.curves import plot
    from stage2_student.evaluation.run_records import read_runs

    if json_path is not None and is_another_file(json_path, is_comparison):
        raise click.UsageError(f"--json {json_path}: {SOMETHING_ELSE}")
    records = read_runs(runs)
    click.echo("\n".join([*table(records), *legend(records), *table_by_teacher(records)]))
    for use in cache_uses(records):
        click.echo(use.line())
    if json_path is not None:
        save(records, json_path)
    for path in plot(records, plots) if plots is not None else []:
        click.echo(path)
    return 0


@commands.command("report")
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.argument("out", type=PAGE)
def report(runs: tuple[Path, ...], out: Path) -> int:
    """Write OUT, one HTML file about RUNS, folders of runs: curves, costs, answers (extra `report`)."""
    from stage2_student.evaluation.report import write_run_report
    from stage2_student.evaluation.run_records import read_runs

    write_run_report(read_runs(runs), out)
    click.echo(out)
    return 0


@commands.command("export")
@click.argument("run_folder", type=PATH)
@click.option("--step", type=click.IntRange(min=0), help="Of the checkpoint; the newest by default.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest validation loss.")
@click.option(
    "--merge/--adapter",
    default=None,
    help="Of a run with LoRA: a whole model, or the adapter; as its recipe says.",
)
@click.option("--out", type=PATH, help="Folder to write; RUN_FOLDER/export by default.")
def export(run_folder: Path, step: int | None, best: bool, merge: bool | None, out: Path | None) -> int:
    """Write a checkpoint of RUN_FOLDER as a Hugging Face folder."""
    from stage2_student.runs.run_folder import RunFolder
    from stage2_student.training.export import choose_checkpoint, export_checkpoint

    if best and step is not None:
        raise click.UsageError("--step and --best choose a checkpoint each; give one of them")
    quiet_libraries()
    folder = RunFolder(run_folder)
    checkpoint = choose_checkpoint(folder, step=step, best=best)
    click.echo(export_checkpoint(folder, checkpoint, out or folder.export, merge=merge))
    return 0


@commands.command("write")
@click.argument("run_folder", type=PATH)
@click.option("--step", type=click.IntRange(min=0), help="Of the checkpoint; the newest by default.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest validation loss.")
@click.option("--recipe", help="Whose data and `write` section to take; the run's own by default.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe."
)
@click.option("--out", type=FOLDER, help="Folder of the answers; RUN_FOLDER/written/step-N by default.")
def write(
    run_folder: Path,
    step: int | None,
    best: bool,
    recipe: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
) -> int:
    """Let a checkpoint of RUN_FOLDER answer the prompts of its data: a data set that a teacher captures."""
    from shared.runtime import distributed
    from shared.stopping import stop_on_signals
    from stage2_student.runs.run_folder import RunFolder
    from stage2_student.training.export import choose_checkpoint
    from stage2_student.write import write as run_write

    if best and step is not None:
        raise click.UsageError("--step and --best choose a checkpoint each; give one of them")
    folder = RunFolder(run_folder)
    checkpoint = choose_checkpoint(folder, step=step, best=best)
    folder.require_as_written()
    loaded = load_recipe(recipe or str(folder.recipe), overrides=overrides)
    with (
        distributed(collective_timeout_s=loaded.parallel.collective_timeout_s) as world,
        stop_on_signals() as stop,
    ):
        return run_write(folder, loaded, checkpoint, world, stop, out=out)


@commands.command("push")
@click.argument("what", metavar="RUN|EXPORT", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that is public.")
@click.option(
    "--revision", metavar="BRANCH", help="Of the repository; made where it is missing. main by default."
)
@click.option("--dry-run", is_flag=True, help="Check the export and list what would be sent; send nothing.")
def push(what: Path, repo_id: str, private: bool, revision: str | None, dry_run: bool) -> int:
    """Send the export of a run to the Hugging Face Hub, as one commit."""
    from stage2_student.publishing.push import plan_push
    from stage2_student.publishing.push import push as send

    plan = plan_push(what, repo_id, revision=revision)
    click.echo("\n".join(plan.lines(private=private)))
    click.echo("dry run: nothing was sent" if dry_run else send(plan, private=private))
    return 0


def main() -> None:
    run_group(commands, goes_on=("run", "sweep", "write"))


if __name__ == "__main__":
    main()
