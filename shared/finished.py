"""Whether a run has come to its end, by what it left on disk; opens no data and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from shared.errors import RecipeError
from shared.recipes import Recipe, baseline_of, load_recipe
from shared.regular_files import read_regular


def has_results(folder: Path) -> bool:
    """Whether a run's folder holds its results, with answers to all that was to be asked."""
    try:
        found = json.loads(read_regular(folder / "results.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.get("unanswered")


def run_is_finished(recipe: Recipe) -> bool:
    """Whether the folder of the recipe's run holds the results, and the export, of this very recipe.

    The run writes its recipe when it begins, with what it chose by itself, and its results last.
    """
    folder = recipe.run.path
    if not has_results(folder) or (recipe.run.export and not (folder / "export").exists()):
        return False
    try:
        began = load_recipe(folder / "recipe.yaml")
        return recipe.as_it_began(began).of_a_run() == began.of_a_run()
    except (OSError, ValueError):
        return False


def baseline_is_finished(recipe: Recipe, overrides: Sequence[str] = ()) -> bool:
    """Whether the run that the recipe's is compared with has results; true where there is none to compare with, or
    its recipe cannot be read.

    overrides  of the recipe
    """
    try:
        baseline = baseline_of(recipe, overrides)
    except RecipeError:
        return True
    return baseline is None or has_results(baseline.run.path)
