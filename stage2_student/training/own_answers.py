"""Rows that the student itself wrote, as their set says: for ``loss.own_kd_ratio`` and ``loss.reverse_kl``.

The latter is an average over what the student draws at temperature 1.  Greedy answers, and samples at other
temperatures or of the likeliest tokens alone, are averages over something else, so they are refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from shared.errors import RecipeError, shortened
from shared.recipes import Recipe


@functools.cache
def is_own(written_by: str) -> bool:
    """Whether a student wrote the answer; ``written_by`` as the row says it."""
    return _told(written_by).get("role") == "student"


def require_samples(recipe: Recipe, writers: Iterable[str]) -> tuple[str, ...]:
    """What is worth saying about the rows that ``loss.reverse_kl`` counts at.

    writers  of the training rows' answers
    Raises   RecipeError  when a student wrote some of them otherwise than by sampling at temperature 1
    """
    if recipe.loss.reverse_kl is None:
        return ()
    own = [_told(one) for one in writers if is_own(one)]
    if not own:
        return (
            "loss.reverse_kl counts at rows that a student wrote, and no training row is one: it adds nothing",
        )
    for told in own:
        if (told.get("temperature"), told.get("top_p")) != (1.0, 1.0):
            raise RecipeError(
                f"loss.reverse_kl: answers of {shortened(str(told.get('run')))} were written at temperature "
                f"{told.get('temperature')} and top_p {told.get('top_p')}: they are no samples of the student. Write "
                "answers with write.temperature 1 and top_p 1, or leave reverse_kl out"
            )
    return ()


def _told(written_by: str) -> dict[str, Any]:
    try:
        found = json.loads(written_by or "{}")
    except (ValueError, RecursionError):  # of another tool, or cut
        return {}
    return found if isinstance(found, dict) else {}
