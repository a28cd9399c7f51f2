"""The command line of stage one: ``teacher-cache``, or ``python -m stage1_teacher`` (under torchrun for more
than one process)."""

from __future__ import annotations

import click

from shared.cli import recipe_arguments
from shared.cli import run as run_group
from shared.config import load_recipe
from shared.runtime import distributed, stop_on_sigterm


@click.group()
def commands() -> None:
    """Run a frozen teacher once and write its targets into a cache."""


@commands.command("capture")
@recipe_arguments
def capture(recipe: str, overrides: tuple[str, ...]) -> int:
    """Make the cache of RECIPE hold all its data; what is there already is not captured again."""
    from stage1_teacher.capture import capture as run_capture

    loaded = load_recipe(recipe, overrides=overrides)
    with distributed() as world, stop_on_sigterm() as stop:
        return run_capture(loaded, world, stop)


def main() -> None:
    run_group(commands)


if __name__ == "__main__":
    main()
