"""Where the tokens of a text are, once a processor has written many tokens in the place of each picture.

    places = aligned(plain, given, placeholder_ids)     # places[n]: of plain[n] in given, or None

A processor may write blanks around a picture that join the tokens beside it, so a few tokens at the ends of a stretch
between placeholders may be missing.  Stretches are found together, in order and with a picture between them: of two
that are alike, the first would else be found in the second one's place.  Where all of them are there as they are, in
one way alone, that way is taken at once: the search takes about the cube of the number of pictures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

MAX_JOINED = 3  # tokens beside a picture that may have become others


class _Match(NamedTuple):
    """Where a stretch is: how many of its first tokens are left out, the place of the others, how many these are."""

    skipped: int
    place: int
    length: int


def aligned(plain: Sequence[int], given: Sequence[int], placeholder_ids: Collection[int]) -> list[int | None]:
    """For each token of ``plain`` its place in ``given``; None where it is not there, or not to be found."""
    places: list[int | None] = [None] * len(plain)
    gaps = [n for n, token in enumerate(plain) if token in placeholder_ids]
    begins, ends = [0, *(gap + 1 for gap in gaps)], [*gaps, len(plain)]
    stretches = [list(plain[begin:end]) for begin, end in zip(begins, ends, strict=True)]
    text = _Text(list(given), placeholder_ids)
    found = _only_way(stretches, text, placeholder_ids) or _fitted(stretches, text)
    if not gaps and found == [None]:
        return _by_the_ends(plain, given)
    for begin, one in zip(begins, found, strict=True):
        if one is not None:
            first = begin + one.skipped
            places[first : first + one.length] = range(one.place, one.place + one.length)
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


class _Text:
    """Tokens that a processor has written, and where each of them is."""

    def __init__(self, ids: list[int], placeholder_ids: Collection[int]) -> None:
        self.ids = ids
        self.where_is: dict[int, list[int]] = {}
        for place, token in enumerate(ids):
            self.where_is.setdefault(token, []).append(place)
        self._pictures = sorted(place for token in placeholder_ids for place in self.where_is.get(token, ()))

    def behind(self, end: int) -> int:
        """Where what follows a picture may begin, the picture standing at ``end`` or later."""
        if not self._pictures:  # of a processor that writes other tokens for one
            return end + 1
        number = bisect_left(self._pictures, end)
        return self._pictures[number] + 1 if number < len(self._pictures) else len(self.ids)


def _only_way(
    stretches: Sequence[list[int]], text: _Text, placeholder_ids: Collection[int]
) -> list[_Match | None] | None:
    """Where all stretches are whole, if from the text's beginning and from its end that is the same; else None."""
    forwards = _nearest(stretches, text)
    if forwards is None:
        return None
    turned = _Text(text.ids[::-1], placeholder_ids)
    backwards = _nearest([stretch[::-1] for stretch in reversed(stretches)], turned)
    if backwards is None:
        return None
    ends = [len(text.ids) - place for place in reversed(backwards)]
    if any(place + len(one) != end for one, place, end in zip(stretches, forwards, ends, strict=True) if one):
        return None
    return [
        _Match(0, place, len(one)) if one else None for one, place in zip(stretches, forwards, strict=True)
    ]


def _nearest(stretches: Sequence[list[int]], text: _Text) -> list[int] | None:
    """The first place of each stretch, whole, behind those before it; None if one of them has none."""
    places, begin = [], 0
    for stretch in stretches:
        starts = text.where_is.get(stretch[0], []) if stretch else [begin]
        later = islice(starts, bisect_left(starts, begin), None)
        place = next((n for n in later if text.ids[n : n + len(stretch)] == stretch), None)
        if place is None:
            return None
        places.append(place)
        if stretch:
            begin = text.behind(place + len(stretch))
    return places


def _fitted(stretches: Sequence[list[int]], text: _Text) -> list[_Match | None]:
    """Where each stretch is: as few as can be are not found, and of the others few tokens are left out."""
    # By where the next stretch may begin: how many were not found, tokens left out, and the matches, last one first.
    states: dict[int, tuple[tuple[int, int], Any]] = {0: ((0, 0), None)}
    last = len(stretches) - 1
    for number, stretch in enumerate(stretches):
        matches = _matches(stretch, text, is_first=number == 0, is_last=number == last)
        # Of equal ones the nearest to its text's end.
        ordered = sorted(matches, key=lambda one: one.place, reverse=0 < number == last)
        options = [(text.behind(one.place + one.length), len(stretch) - one.length, one) for one in ordered]
        following: dict[int, tuple[tuple[int, int], Any]] = {}
        for where, ((lost, cut), path) in states.items():
            ways: list[tuple[int, tuple[int, int], _Match | None]] = [
                (begin, (lost, cut + left_out), one) for begin, left_out, one in options if one.place >= where
            ]
            for begin, cost, way in [*ways, (where, (lost + bool(stretch), cut), None)]:
                if begin not in following or cost < following[begin][0]:
                    following[begin] = (cost, (way, path))
        states = following
    _, path = min(states.values(), key=lambda state: state[0])
    found = []
    while path is not None:
        one, path = path
        found.append(one)
    return found[::-1]


def _matches(stretch: list[int], text: _Text, *, is_first: bool, is_last: bool) -> Iterator[_Match]:
    """All places of a stretch, whole or without a few tokens at its ends; the text's own ends stay."""
    for head in range(1 if is_first else MAX_JOINED + 1):
        for tail in range(1 if is_last else MAX_JOINED + 1):
            part = stretch[head : len(stretch) - tail]
            for place in text.where_is.get(part[0], ()) if part else ():
                if text.ids[place : place + len(part)] == part:
                    yield _Match(head, place, len(part))
