"""Rows that the student itself wrote, as their set says: for ``loss.own_kd_ratio`` and ``loss.reverse_kl``.

The latter is an average over what the student draws at temperature 1.  Greedy answers, and samples at other
temperatures or of the likeliest tokens alone, are averages over something else, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.data.written import told_writer
from shared.errors import RecipeError, shortened
from shared.recipes import Recipe


def counts_own(recipe: Recipe) -> bool:
    """Whether the loss counts answers that the student wrote otherwise than others."""
    return recipe.loss.own_kd_ratio is not None or recipe.loss.reverse_kl is not None


def require_samples(recipe: Recipe, writers: Iterable[str]) -> tuple[str, ...]:
    """What is worth saying about the rows that ``loss.own_kd_ratio`` and ``loss.reverse_kl`` count at.

    writers  of the training rows' answers that a student wrote
    Raises   RecipeError  when ``loss.reverse_kl`` has some that were not sampled at temperature 1
    """
    own = [told_writer(one) for one in writers]
    if not own:
        return tuple(
            f"loss.{name} counts at rows that a student wrote, and no training row is one: it has no effect"
            for name in ("own_kd_ratio", "reverse_kl")
            if getattr(recipe.loss, name) is not None and recipe.rounds is None
        )
    for told in own if recipe.loss.reverse_kl is not None else ():
        if (told.get("temperature"), told.get("top_p")) != (1.0, 1.0):
            raise RecipeError(
                f"loss.reverse_kl: answers of {shortened(str(told.get('run')))} were written at temperature "
                f"{told.get('temperature')} and top_p {told.get('top_p')}: they are no samples of the student. Write "
                "answers with write.temperature 1 and top_p 1, or leave reverse_kl out"
            )
    return ()
