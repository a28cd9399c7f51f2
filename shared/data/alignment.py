"""Where the tokens of a text are, once a processor has written many tokens in the place of each picture.

    places = aligned(plain, given, placeholder_ids)     # places[n]: of plain[n] in given, or None

Stretches between placeholders are looked for in order.  A processor may write blanks around a picture that join
the tokens beside it, so a few tokens at the ends of a stretch may be missing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

MAX_JOINED = 3  # tokens beside a picture that may have become others


def aligned(plain: Sequence[int], given: Sequence[int], placeholder_ids: Collection[int]) -> list[int | None]:
    """For each token of ``plain`` its place in ``given``; None where it is not there, or not to be found."""
    places: list[int | None] = [None] * len(plain)
    gaps = [n for n, token in enumerate(plain) if token in placeholder_ids]
    if not gaps:
        whole = _find(plain, given, 0, is_first=True, is_last=True)
        return _by_the_ends(plain, given) if whole is None else list(range(whole[1], whole[1] + len(plain)))
    begins, ends = [0, *(gap + 1 for gap in gaps)], [*gaps, len(plain)]
    where = 0
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        is_first, is_last = number == 0, number == len(gaps)
        found = _find(plain[begin:end], given, where, is_first=is_first, is_last=is_last)
        if found is None:
            continue
        skipped, place, length = found
        for step in range(length):
            places[begin + skipped + step] = place + step
        where = place + length
    return places


def _by_the_ends(plain: Sequence[int], given: Sequence[int]) -> list[int | None]:
    """What both begin with and end with: where it is not known what stands for a picture."""
    places: list[int | None] = [None] * len(plain)
    limit, more = min(len(plain), len(given)), len(given) - len(plain)
    head = next((n for n in range(limit) if plain[n] != given[n]), limit)
    tail = next((n for n in range(limit) if plain[-1 - n] != given[-1 - n]), limit)
    for n in range(head):
        places[n] = n
    for n in range(max(head, len(plain) - tail), len(plain)):
        places[n] = n + more
    return places


def _find(
    stretch: Sequence[int], given: Sequence[int], where: int, *, is_first: bool, is_last: bool
) -> tuple[int, int, int] | None:
    """How many tokens are left out at its beginning, where the rest is, and how many these are."""
    cuts = sorted(
        (
            (a, b)
            for a in range(1 if is_first else MAX_JOINED + 1)
            for b in range(1 if is_last else MAX_JOINED + 1)
        ),
        key=sum,
    )
    for head, tail in cuts:
        part = list(stretch[head : len(stretch) - tail])
        if not part:
            continue
        last = len(given) - len(part)
        likely = [0] if is_first else [last] if is_last else []
        for place in (*likely, *range(where, last + 1)):
            if place >= where and list(given[place : place + len(part)]) == part:
                return head, place, len(part)
    return None
