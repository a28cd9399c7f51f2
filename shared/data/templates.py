"""A chat template as text with gaps: what it writes around the texts of a conversation, whatever these say.

    template = Template(tokenizer, source)
    layout, texts = template.follow(turns, where="train, row 17")
    layout.text(texts)          # the prompt up to where the last answer begins

A template is rendered with words in place of the texts that no template treats specially, once for each shape of
conversation; so what it does with a text (trimming, searching for tags) cannot depend on the data.  Where it does
something to the texts of a conversation all the same, as to drop the thoughts of earlier answers, that is followed:
the pieces between the tags that the template's source mentions take the words' places.

A template that asks for the date is told the one that is given here.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from shared.data.conversations import Turn, question_answer
from shared.data.fingerprints import digest
from shared.errors import DataError, RecipeError, shortened

MAX_SHAPES = 512  # kept; a shape takes a few kilobytes
_TAG = re.compile(r"<[^<>\s'\"{}]{1,64}>|\[/?[A-Z_]{2,32}\]")
_ANOTHER_DAY = Date(2001, 2, 3)
_DATE_STRING = "%d %b %Y"  # as Llama's templates take it
_ANSWER = "teachonceanswer"
_WORD = re.compile("teachonceword[a-j]{6}")
_PARTS = re.compile(r"\{'type': '(?:text|image)'")  # a turn's list of parts, as Python writes it
_Shape = tuple[tuple[str, tuple[bool, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """``fixed[0]``, a text, ``fixed[1]``, ..., ``fixed[-1]``: the prompt up to where the last answer begins.

    owners      of each text the number of its turn
    begun       the end of ``fixed[-1]`` that the template writes into an answer, such as an empty thought
    lead        blanks between the prompt and the answer, if any
    tail        what follows an answer
    is_textual  whether turns without pictures are given as texts, and not as lists of one part
    """

    fixed: tuple[str, ...]
    owners: tuple[int, ...]
    begun: str
    lead: str
    tail: str
    is_textual: bool

    def text(self, texts: Sequence[str]) -> str:
        return "".join(part for pair in zip(self.fixed, (*texts, ""), strict=True) for part in pair)

    def places(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """Where each text begins and ends in ``text(texts)``."""
        found, end = [], 0
        for fixed, text in zip(self.fixed, texts, strict=False):
            begin = end + len(fixed)
            end = begin + len(text)
            found.append((begin, end))
        return found


class Template:
    """A template's source and all that it is told beside the conversation.

    system_prompt  the system turn of conversations that have none
    date           None: today's
    placeholders   what the processor takes for a picture; empty: not known

    Raises   RecipeError  for a template that fails, drops or repeats the question or drops the picture
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        *,
        system_prompt: str | None = None,
        date: Date | None = None,
        placeholders: Sequence[str] = (),
    ) -> None:
        self.name = tokenizer.name_or_path
        self._tokenizer, self._source, self._system_prompt = tokenizer, source, system_prompt
        self._day, self._is_given = date or Date.today(), date is not None
        tags = sorted(set(_TAG.findall(source)), key=len, reverse=True)
        self._tags = re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None
        self._placeholders = placeholders
        self._shapes: dict[_Shape, Layout] = {}
        self.thinking = False if "enable_thinking" in source else None
        self._is_textual = False  # turns without pictures are given as texts at once
        self.first = self._first_layout()
        self._is_textual = self.first.is_textual
        self.date = self._day if self._prints_the_date() else None
        self.writes_lists = self._writes_lists()

    def follow(self, turns: Sequence[Turn], *, where: str) -> tuple[Layout, list[str]]:
        """The layout of a conversation without its last answer, and the texts in it.

        Raises   DataError  naming ``where``, when the template refuses the conversation, or changes its texts
                            in a way that cannot be followed
        """
        if is_single(turns):
            return self.first, [part for part in turns[0].parts if part is not None]
        try:
            layout = self._layout(turns)
            texts = [part for turn in turns[:-1] for part in turn.parts if part is not None]
            asked = self._render(turns[:-1], ask=True, is_textual=layout.is_textual) + layout.begun
            if layout.text(texts) == asked:
                return layout, texts
            followed = self._pieces_kept(turns, layout)
        except _UnusableError as error:
            raise DataError(f"{where}: the chat template of {self.name} {error}") from error
        if followed is None or followed[0].text(followed[1]) != asked:
            raise DataError(
                f"{where}: the chat template of {self.name} changes the texts of this conversation in a way that "
                "cannot be followed. Look for tags of the template in them"
            )
        return followed

    def dated(self) -> dict[str, str]:
        """Of a template that prints the date, the date and what is written with it; else nothing."""
        if self.date is None:
            return {}
        return {"date": self.date.isoformat(), "rendered": self.rendered}

    @property
    def rendered(self) -> str:
        """Hex digest of what is written around question and answer."""
        first = self.first
        return digest([*first.fixed, first.lead, first.tail])

    def _first_layout(self) -> Layout:
        """Of one question about one picture."""
        single = question_answer("question", "answer", 1)
        try:
            found = self._written(single)
        except _UnusableError as error:
            raise RecipeError(f"chat template of {self.name}: it {error}") from error
        self._require_pictures(found, lambda: self._written(question_answer("question", "answer", 0)))
        self._shapes[_shape(single)] = found
        return found

    def _require_pictures(self, found: Layout, textual: Callable[[], Layout]) -> None:
        def written(layout: Layout) -> str:
            return "".join("".join(layout.fixed).split())

        if not self._placeholders or any(one in "".join(found.fixed) for one in self._placeholders):
            return
        try:
            is_blind = written(found) == written(textual())
        except _UnusableError:  # a template that asks for a picture sees it
            return
        if is_blind:
            raise RecipeError(
                f"chat template of {self.name}: it writes the same text with and without a picture; "
                "needed is one that writes the model's picture placeholder"
            )

    def _layout(self, turns: Sequence[Turn]) -> Layout:
        shape = _shape(turns)
        if shape not in self._shapes:
            found = self._written(turns)
            self._require_places(found, sum(turn.num_pictures for turn in turns))
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes = {_shape(question_answer("question", "answer", 1)): self.first}
            self._shapes[shape] = found
        return self._shapes[shape]

    def _require_places(self, found: Layout, number: int) -> None:
        """Each picture is written as that of a single question is."""
        for placeholder in self._placeholders:
            single = sum(fixed.count(placeholder) for fixed in self.first.fixed)
            written = sum(fixed.count(placeholder) for fixed in found.fixed)
            if single and written != single * number:
                raise _UnusableError(f"writes {written // single} of {number} picture(s)")

    def _written(self, turns: Sequence[Turn]) -> Layout:
        """What is written around the texts of a conversation of this shape.

        The template is taken to want lists of parts, or else plain texts, for turns without pictures.
        """
        if not self._is_textual:
            with contextlib.suppress(_UnusableError):
                return self._written_of(turns, is_textual=False)
        return self._written_of(turns, is_textual=True)

    def _written_of(self, turns: Sequence[Turn], *, is_textual: bool) -> Layout:
        standing, words = _with_words(turns[:-1])
        asked = self._render(standing, ask=True, is_textual=is_textual)
        answer = Turn("assistant", (_ANSWER,))
        answered = self._render([*standing, answer], ask=False, is_textual=is_textual)
        if _PARTS.search(asked + answered):
            raise _UnusableError("writes the parts of a turn as a list")
        counts = Counter(_WORD.findall(asked))
        found = [counts[word] for _, word in words]
        if len(turns) == 2 and (found != [1] * len(found) or answered.count(_ANSWER) != 1):
            raise _UnusableError(
                "is of no use: question and answer must each stand once in its text, "
                f"found {found[0] if found else 1} and {answered.count(_ANSWER)}"
            )
        for (owner, _), count in zip(words, found, strict=True):
            if count != 1:
                role = turns[owner].role
                raise _UnusableError(f"writes the text of turn {owner + 1}, the {role}'s, {count} times")
        fixed, end = [], 0
        for _, word in words:
            begin = asked.find(word, end)
            if begin < 0:
                raise _UnusableError("writes the texts of a conversation in another order")
            fixed.append(asked[end:begin])
            end = begin + len(word)
        before, _, tail = answered.rpartition(_ANSWER)
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        # What is written ahead of each answer, such as an empty thought, is prompt and not label.
        begun = lead if lead.strip() else ""
        owners = tuple(owner for owner, _ in words)
        return Layout((*fixed, asked[end:] + begun), owners, begun, "" if begun else lead, tail, is_textual)

    def _pieces_kept(self, turns: Sequence[Turn], layout: Layout) -> tuple[Layout, list[str]] | None:
        """With words for the pieces between tags, as far as they stay; None where that cannot be said."""
        if self._tags is None:
            return None
        standing, pieces = _with_pieces(turns[:-1], self._tags)
        asked = self._render(standing, ask=True, is_textual=layout.is_textual) + layout.begun
        written = [(one[0], one.start()) for one in _WORD.finditer(asked)]
        begins = dict(written)
        kept = [(piece, begins[piece.word]) for piece in pieces if piece.word in begins]
        if [
            (piece.word, begin) for piece, begin in kept
        ] != written:  # some are repeated, or in another order
            return None
        fixed, owners, texts, end = [], [], [], 0
        for owner, text, begin, stop in _joined(asked, pieces, kept):
            fixed.append(asked[end:begin])
            owners.append(owner)
            texts.append(text)
            end = stop
        return replace(layout, fixed=(*fixed, asked[end:]), owners=tuple(owners)), texts

    def _prints_the_date(self) -> bool:
        """Whether what it writes of a question, with a system turn or without, changes with the day."""
        if "strftime_now" not in self._source and not (self._is_given and "date_string" in self._source):
            return False

        def written(turns: Sequence[Turn], day: Date, *, is_textual: bool) -> str:
            try:
                return self._render(turns, ask=True, day=day, is_textual=is_textual)
            except _UnusableError as error:
                return str(error)

        user = Turn("user", ("question",))
        return any(
            written(turns, self._day, is_textual=form) != written(turns, _ANOTHER_DAY, is_textual=form)
            for turns in ([user], [Turn("system", ("Be brief.",)), user])
            for form in {self._is_textual, True}
        )

    def _writes_lists(self) -> bool:
        """Whether it writes a list itself of turns that are given as lists, in conversations of some kind.

        Once such prompts were taken.
        """
        if self._is_textual:
            return False
        system, said = Turn("system", ("Be brief.",)), Turn("assistant", ("answer",))
        for user in (Turn("user", ("question",)), Turn("user", (None, "question"))):
            for turns in ([user], [system, user], [user, said, user], [system, user, said, user]):
                with contextlib.suppress(_UnusableError):
                    if _PARTS.search(self._render(turns, ask=True, is_textual=False)):
                        return True
        return False

    def _render(self, turns: Sequence[Turn], *, ask: bool, is_textual: bool, day: Date | None = None) -> str:
        day = day or self._day
        if self._system_prompt is not None and all(turn.role != "system" for turn in turns):
            turns = [Turn("system", (self._system_prompt,)), *turns]
        options: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        if self._is_given and "date_string" in self._source:
            options["date_string"] = day.strftime(_DATE_STRING)
        try:
            text = self._tokenizer.apply_chat_template(
                [_message(turn, is_textual=is_textual) for turn in turns],
                chat_template=_dated(self._source, day),
                tokenize=False,
                add_generation_prompt=ask,
                **options,
            )
        except Exception as error:  # templates raise errors of their own
            roles = ", ".join(turn.role for turn in turns)
            reason = shortened(f"{type(error).__name__}: {error}")
            raise _UnusableError(f"refuses a conversation of {shortened(roles)}: {reason}") from error
        return str(text)


class _UnusableError(Exception):
    """What a template does, as the end of a sentence about it."""


@dataclass(frozen=True)
class _Piece:
    """A stretch of a text without tags: the word that stands for it, and where it is in the text."""

    owner: int
    number: int  # of the text in the conversation
    word: str
    text: str  # the whole one
    begin: int
    end: int


def is_single(turns: Sequence[Turn]) -> bool:
    """Whether a conversation is one question about one picture before it, and its answer."""
    return (
        len(turns) == 2 and turns[0].role == "user" and [p is None for p in turns[0].parts] == [True, False]
    )


def _shape(turns: Sequence[Turn]) -> _Shape:
    return tuple((turn.role, tuple(part is None for part in turn.parts)) for turn in turns)


def _message(turn: Turn, *, is_textual: bool) -> dict[str, Any]:
    """As templates take it."""
    if is_textual and None not in turn.parts:
        return {"role": turn.role, "content": "".join(part for part in turn.parts if part is not None)}
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
    return {"role": turn.role, "content": parts}


def _word(number: int) -> str:
    """None is part of another, and no template knows it."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in f"{number:06d}")
    return f"teachonceword{letters}"


def _with_words(turns: Sequence[Turn]) -> tuple[list[Turn], list[tuple[int, str]]]:
    """The turns with a word for each text, and the words with the numbers of their turns."""
    words: list[tuple[int, str]] = []
    standing = []
    for owner, turn in enumerate(turns):
        parts: list[str | None] = []
        for part in turn.parts:
            if part is not None:
                words.append((owner, _word(len(words))))
            parts.append(None if part is None else words[-1][1])
        standing.append(Turn(turn.role, tuple(parts)))
    return standing, words


def _with_pieces(turns: Sequence[Turn], tags: re.Pattern[str]) -> tuple[list[Turn], list[_Piece]]:
    """As ``_with_words``, a word for each stretch between tags; the blanks at its ends and the tags stay."""
    pieces: list[_Piece] = []
    standing, number = [], 0
    for owner, turn in enumerate(turns):
        parts: list[str | None] = []
        for part in turn.parts:
            if part is None:
                parts.append(None)
                continue
            written, place = "", 0
            for stretch in tags.split(part):
                core = stretch.strip()
                if core and not tags.fullmatch(stretch):
                    begin = place + stretch.index(core)
                    pieces.append(_Piece(owner, number, _word(len(pieces)), part, begin, begin + len(core)))
                    written += stretch.replace(core, pieces[-1].word)
                else:
                    written += stretch
                place += len(stretch)
            parts.append(written)
            number += 1
        standing.append(Turn(turn.role, tuple(parts)))
    return standing, pieces


def _joined(
    asked: str, pieces: Sequence[_Piece], kept: Sequence[tuple[_Piece, int]]
) -> Iterator[tuple[int, str, int, int]]:
    """Owner and text of each stretch that stands in ``asked`` as it was, and where it begins and ends there.

    A tag that stands beside pieces of a text as it did in the text is part of it, and not the template's.
    """
    number_of = {piece.word: number for number, piece in enumerate(pieces)}
    runs: list[tuple[_Piece, _Piece, int, int]] = []  # first and last piece, begin and end in ``asked``
    for piece, begin in kept:
        end = begin + len(piece.word)
        if runs:
            first, last, run_begin, run_end = runs[-1]
            is_next = last.number == piece.number and number_of[piece.word] == number_of[last.word] + 1
            if is_next and asked[run_end:begin] == piece.text[last.end : piece.begin]:
                runs[-1] = (first, piece, run_begin, end)
                continue
        runs.append((piece, piece, begin, end))
    limit = 0
    for place, (first, last, begin, end) in enumerate(runs):
        before, behind = first.text[: first.begin], last.text[last.end :]
        next_begin = runs[place + 1][2] if place + 1 < len(runs) else len(asked)
        is_first = number_of[first.word] == 0 or pieces[number_of[first.word] - 1].number != first.number
        is_last = last is pieces[-1] or pieces[number_of[last.word] + 1].number != last.number
        text_begin, text_end = first.begin, last.end
        if is_first and asked[limit:begin].endswith(before):
            text_begin, begin = 0, begin - len(before)
        if is_last and asked[end:next_begin].startswith(behind):
            text_end, end = len(last.text), end + len(behind)
        yield first.owner, first.text[text_begin:text_end], begin, end
        limit = end


@lru_cache(maxsize=64)
def _dated(source: str, day: Date) -> str:
    """The template with a ``strftime_now`` of its own, which knows the formats that the source has between quotes."""
    if "strftime_now" not in source:
        return source
    formats = sorted(
        {
            value[1:-1]
            for _, kind, value in jinja2.Environment().lex(source)
            if kind == "string" and "%" in value
        }
    )
    cases = "".join(
        f"{{%- if format == {one!r} %}}{{{{ {day.strftime(one)!r} }}}}{{% endif -%}}" for one in formats
    )
    other = "{{ raise_exception('unknown format of a date') }}"
    known = f"{{%- if format not in {formats!r} %}}{other}{{% endif -%}}"
    return f"{{% macro strftime_now(format) %}}{known}{cases}{{% endmacro %}}\n{source}"
