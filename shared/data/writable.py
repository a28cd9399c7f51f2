"""Whether a model can write answers to a split's rows: a written row must be asked as its original was.

    require_writable(open_split(data, "train"))

Commands that need answers later ask it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shared.data.conversations import PLACEHOLDER
from shared.data.rows import Example, VqaSplit
from shared.errors import DataError, RecipeError


def require_writable(split: VqaSplit, rows: Sequence[int] = (0,)) -> None:
    """Raises   RecipeError  when no files can hold what a model writes to this split

    rows  some usable ones: to read them all takes longer than to find out late
    """
    if "/" in split.name:
        raise RecipeError(
            f"split {split.name!r}: its name cannot be a file's; answers are in files of that name"
        )
    columns = split.settings.columns
    lacking = [name for name in ("answer_ids", "answer_end", "written_by") if getattr(columns, name) is None]
    if lacking:
        raise RecipeError(
            f"data.columns.{lacking[0]} is null: what a model writes needs a column for it. Leave the key out"
        )
    for row in rows:
        try:
            example = split[row]
        except (DataError, IndexError):  # whoever reads all rows says what is wrong with it
            continue
        if example.form == "question_answer":
            question_of(split, example)


def system_of(example: Example) -> str | None:
    """What the system says before anyone else; None where it says nothing."""
    return example.turns[0].text if example.turns[0].role == "system" else None


def question_of(split: VqaSplit, example: Example) -> str:
    """With the places of its pictures, where they are not all in front of it.

    Raises   RecipeError  when it is a list of several turns, or a turn of texts in a row: one text may not equal it
    """
    has_system = split.system_column is not None and system_of(example) is not None
    asked, *rest = example.turns[1:] if has_system else example.turns
    if len(rest) != 1:
        raise RecipeError(
            f"{example.where}: its question and answer are lists of turns; a model can write answers to rows that "
            "have all turns in one column (data.columns.messages)"
        )
    if any(one is not None and other is not None for one, other in pairwise(asked.parts)):
        raise RecipeError(
            f"{example.where}: its question is a turn of several texts in a row; a model can write answers to rows "
            "that have all turns in one column (data.columns.messages), or a question of one text"
        )
    if None not in asked.parts[asked.num_pictures :]:
        return asked.text
    return "".join(PLACEHOLDER if part is None else part for part in asked.parts)
