"""What was said in a row up to its last answer, as names and texts for a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.data.conversations import Turn
from shared.data.rows import Example
from shared.data.templates import is_single


def spoken(example: Example) -> dict[str, str]:
    """The turns before the last answer by number and role, the last user's as ``question``; pictures as numbers."""
    if is_single(example.turns):
        return {"question": example.question}
    turns = example.turns[:-1]
    asked = max(n for n, turn in enumerate(turns) if turn.role == "user")
    return {
        "question" if n == asked else f"{n + 1}. {turn.role}": text
        for n, (turn, text) in enumerate(zip(turns, _with_numbers(turns), strict=True))
    }


def _with_numbers(turns: Sequence[Turn]) -> Iterator[str]:
    number = 0
    for turn in turns:
        shown = []
        for part in turn.parts:
            number += part is None
            shown.append(f"[picture {number}]" if part is None else part.strip())
        yield " ".join(shown)
