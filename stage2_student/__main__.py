"""The command line of stage two: ``train-student``, or ``python -m stage2_student`` (under torchrun for more
than one process)."""

from __future__ import annotations

from pathlib import Path

import click

from shared.cli import recipe_arguments
from shared.cli import run as run_group
from shared.config import load_recipe
from shared.runtime import distributed


@click.group()
def commands() -> None:
    """Train a student from a teacher's cache."""


@commands.command("run")
@recipe_arguments
@click.option("--resume", is_flag=True, help="Go on with the run of this name where it stopped.")
def run(recipe: str, overrides: tuple[str, ...], resume: bool) -> int:
    """Train the student of RECIPE; from the cache, unless loss.kd_ratio is 0."""
    from stage2_student.train import train

    loaded = load_recipe(recipe, overrides=overrides)
    with distributed() as world:
        return train(loaded, world, resume=resume)


@commands.command("check")
@recipe_arguments
@click.option(
    "--nproc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes to plan for."
)
def check(recipe: str, overrides: tuple[str, ...], nproc: int) -> int:
    """Say what RECIPE would do and what it would take, and everything that is wrong with it."""
    from stage2_student.check import check_recipe

    return check_recipe(load_recipe(recipe, overrides=overrides), num_ranks=nproc).show()


@commands.command("evaluate")
@recipe_arguments
@click.option(
    "--model", type=click.Path(path_type=Path), help="Folder to evaluate; the run's export by default."
)
def evaluate(recipe: str, overrides: tuple[str, ...], model: Path | None) -> int:
    """Let a trained student answer validation questions of RECIPE, and count the right ones."""
    from stage2_student.evaluate import evaluate_folder, print_scores

    loaded = load_recipe(recipe, overrides=overrides)
    with distributed() as world:
        scores = evaluate_folder(loaded, model or loaded.run.path / "export", world)
        if world.is_main:
            print_scores(scores)
    return 0


@commands.command("export")
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="Of the checkpoint; the newest by default.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest validation loss.")
@click.option(
    "--merge/--adapter",
    default=None,
    help="Of a run with LoRA: a whole model, or the adapter; as its recipe says.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; RUN_FOLDER/export by default.")
def export(run_folder: Path, step: int | None, best: bool, merge: bool | None, out: Path | None) -> int:
    """Write a checkpoint of RUN_FOLDER as a Hugging Face folder."""
    from stage2_student.export import choose_checkpoint, export_checkpoint
    from stage2_student.run_folder import RunFolder

    folder = RunFolder(run_folder)
    checkpoint = choose_checkpoint(folder, step=step, best=best)
    click.echo(export_checkpoint(folder, checkpoint, out or folder.export, merge=merge))
    return 0


def main() -> None:
    run_group(commands)


if __name__ == "__main__":
    main()
