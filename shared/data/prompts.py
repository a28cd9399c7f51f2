"""A chat template and a tokenizer become the token ids of a conversation, and say which of them are answers.

    prompts = ChatPrompt(tokenizer, template)
    prompt = prompts.of(example.turns, where="train, row 17")
    prompt.text                                     # what the processor turns into prompt tokens
    tokens, answers = prompts.finished(prompt, tokens)
    prompts.answer_ids(prompt, example.answer)      # the labels of the last answer, before the end of the turn
    prompts.end_of_turn                             # the label after them

**Chat markers stand for themselves.**  A text that holds ``<|im_end|>``, or any other added token, must not end
the turn.  Such a conversation is tokenized without the added tokens, piecewise between those of the template;
texts without markers take the ordinary path, and both paths agree on them (tested).  Added tokens that are no markers
are text: Gemma's tokenizers have added ones for line breaks and for runs of blanks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from shared.data.alignment import aligned
from shared.data.conversations import Turn
from shared.data.templates import MAX_SHAPES, Layout, Template
from shared.errors import DataError, RecipeError, shortened

PROMPT_VERSION = 1  # of the rules in this module; changes the keys of examples

_QUESTION = "teachoncequestion"


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its last answer.

    text         what goes through the processor; words stand for the texts where one of these holds a marker
    is_marked    whether that is so
    earlier      numbers of the turns that are earlier answers
    where        how messages name its row
    """

    layout: Layout
    texts: tuple[str, ...]
    text: str
    is_marked: bool
    earlier: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Answered:
    """Tokens of an earlier answer, [begin, end) of the prompt's, and that which ends its turn; None without one."""

    begin: int
    end: int
    end_of_turn: int | None


@dataclass(frozen=True)
class _Tokens:
    """Ids of a text, and the characters of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def of(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens that hold the characters [begin, end); they stand in order."""
        first = bisect_right(self.offsets, begin, key=lambda one: one[1])
        last = bisect_left(self.offsets, end, key=lambda one: one[0])
        return (first, last) if first < last else (0, 0)


@dataclass(frozen=True)
class _Known:
    """Of a layout: the added tokens that the template writes, and the text behind the last of them."""

    added: list[int]
    turn: str
    begins: bool  # that text is the whole


@dataclass(frozen=True)
class _Window:
    """A stretch between the template's added tokens: its characters, its tokens, the numbers of the texts in it."""

    begin: int
    end: int
    first: int
    last: int
    texts: tuple[int, ...]


class ChatPrompt:
    """The fixed parts of prompts, and the two ways of tokenizing what lies between them.

    placeholders  what the processor takes for a picture, of which a template writes one; empty: not known

    Raises   RecipeError  when the tokenizer or its template cannot serve: no Rust backend, a template that
             drops or repeats the question or drops the picture, no token that ends a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        system_prompt: str | None = None,
        date: Date | None = None,
        placeholders: Sequence[str] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise RecipeError(
                f"tokenizer {type(tokenizer).__name__} has no tokenizer.json; markers in the data cannot be "
                "kept apart from the template's. Convert it to a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._bare = without_added_tokens(tokenizer)
        self._bare_within = _within(self._bare)
        self.spelled = _unknown_id(tokenizer)
        self._added_ids = (
            set(tokenizer.added_tokens_decoder) - {self.spelled} - _written_as_text(tokenizer, self._bare)
        )
        self.template = Template(
            tokenizer, template, system_prompt=system_prompt, date=date, placeholders=placeholders
        )
        self._placeholder_ids = {
            tokenizer.get_vocab()[one] for one in placeholders if one in tokenizer.get_vocab()
        }
        before = self.template.first.fixed[0].lstrip()
        bos = tokenizer.bos_token
        self.add_special_tokens = not (bos is not None and before.startswith(bos))
        self._num_appended = self._count_appended() if self.add_special_tokens else 0
        self._known: dict[Layout, _Known] = {}
        self.end_of_turn = self._end_of_turn()

    def changed_rules(self) -> dict[str, object]:
        """What was once done otherwise, where it matters for this tokenizer: part of the keys of examples."""
        changed: dict[str, object] = {}
        if self._num_appended:
            changed["appended"] = self._num_appended
        before, bos = self.template.first.fixed[0], self._tokenizer.bos_token
        if bos is not None and before.lstrip().startswith(bos) and not before.startswith(bos):
            changed["bos"] = "behind blanks"
        if self._bare_within is not None:
            changed["blank before a text"] = "at its beginning alone"
        if self.template.writes_lists:
            changed["turns without pictures"] = "texts where their list would be written"
        return changed

    def of(self, turns: Sequence[Turn], *, where: str) -> Prompt:
        """Raises   DataError  naming ``where``, as ``Template.follow``"""
        layout, texts = self.template.follow(turns, where=where)
        text = layout.text(texts)
        is_marked = self._added(self._encode(text)) != self._of_layout(layout).added
        earlier = tuple(n for n, turn in enumerate(turns[:-1]) if turn.role == "assistant")
        if is_marked:
            text = layout.text(_words(layout))
        return Prompt(layout, tuple(texts), text, is_marked, earlier, where)

    def plain_ids(self, prompt: Prompt) -> torch.Tensor:
        """(S,) int64, of its text as it is, pictures' placeholders not expanded."""
        return torch.tensor(self._encode(prompt.text))

    def without_appended(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Removes what the tokenizer writes after any text, such as an end of text: here the answer follows.

        Shapes   tokens: (S, ...) each, a processed ``Prompt.text``
        """
        return {name: value[: len(value) - self._num_appended] for name, value in tokens.items()}

    def finished(
        self, prompt: Prompt, tokens: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[Answered]]:
        """Puts texts that hold markers in place of their words, and finds the earlier answers.

        Shapes   tokens: (S, ...) each, ``input_ids`` among them: a processed ``Prompt.text``, its image
                 placeholders expanded
        Returns  the same with another S; what else is known of a word's tokens holds for its text's
        Raises   DataError  naming the row, when the processor changes the text so much that texts are not found in it
        """
        if not prompt.is_marked and not prompt.earlier:
            return tokens, []
        plain = self._tokens_of(prompt.text)
        places = aligned(plain.ids, tokens["input_ids"].tolist(), self._placeholder_ids)
        if prompt.is_marked:
            return self._put_in(prompt, plain, places, tokens)
        found = {}
        for number, (begin, end) in enumerate(prompt.layout.places(prompt.texts)):
            if prompt.layout.owners[number] in prompt.earlier:
                found[number] = self._answered(plain, begin, end, prompt, places)
        return tokens, _by_turn(prompt, found)

    def answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """The last answer's token ids as they follow the prompt; markers in it are spelled out."""
        known = self._of_layout(prompt.layout)
        turn = known.turn
        before = self._text_ids(turn, begins=known.begins).ids
        joined = self._text_ids(turn + prompt.layout.lead + answer, begins=known.begins).ids
        if joined[: len(before)] == before:
            return joined[len(before) :]
        return self._text_ids(prompt.layout.lead + answer, begins=known.begins).ids

    def spelled_out(self, text: str) -> list[str]:
        """The added tokens, in order, that a text says and that become pieces of text."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._tokenizer.convert_ids_to_tokens(self._added(ids)))

    def _answered(
        self, tokens: _Tokens, begin: int, end: int, prompt: Prompt, places: Sequence[int | None]
    ) -> Answered:
        """Of the characters [begin, end) of a prompt's tokenized text."""
        first, last = tokens.of(begin, end)
        start, stop = _stretch(places, first, last, where=prompt.where)
        closing = next((n for n in range(last, len(tokens.ids)) if tokens.ids[n] in self._added_ids), None)
        if closing is not None and (
            tokens.ids[closing] != self.end_of_turn or prompt.text[end : tokens.offsets[closing][0]].strip()
        ):
            closing = None
        return Answered(start, stop, None if closing is None else places[closing])

    def _put_in(
        self, prompt: Prompt, plain: _Tokens, places: Sequence[int | None], tokens: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[Answered]]:
        """Each window's tokens are those of the texts themselves, without added tokens."""
        given = tokens["input_ids"].tolist()
        standing = prompt.layout.places(_words(prompt.layout))
        source: list[int] = []  # for each new token one whose other properties it has
        ids: list[int] = []
        found: dict[int, Answered] = {}
        end = 0
        for window in self._windows(standing, plain, len(prompt.text)):
            start, stop = _stretch(places, window.first, window.last, where=prompt.where)
            text, spans = _window_text(prompt, standing, window)
            inner = self._text_ids(text, begins=window.begin == 0)
            source += [*range(end, start), *[start] * len(inner.ids)]
            ids += [*given[end:start], *inner.ids]
            base, end = len(ids) - len(inner.ids), stop
            for number, (begin, finish) in zip(window.texts, spans, strict=True):
                first, last = inner.of(begin, finish)
                closes = not text[finish:].strip() and given[stop : stop + 1] == [self.end_of_turn]
                found[number] = Answered(base + first, base + last, len(ids) if closes else None)
        source += range(end, len(given))
        ids += given[end:]
        index = torch.tensor(source)
        changed = {name: value[index] for name, value in tokens.items()}
        changed["input_ids"] = torch.tensor(ids, dtype=tokens["input_ids"].dtype)
        earlier = {n: one for n, one in found.items() if prompt.layout.owners[n] in prompt.earlier}
        return changed, _by_turn(prompt, earlier)

    def _windows(self, standing: Sequence[tuple[int, int]], plain: _Tokens, length: int) -> list[_Window]:
        """Of the text of words, which stand at these places."""
        added = [n for n, token in enumerate(plain.ids) if token in self._added_ids]
        starts, stops = zip((0, 0), *(plain.offsets[n] for n in added), (length, length), strict=True)
        around = [-1, *added, len(plain.ids)]  # the text's beginning and end are no tokens
        windows: list[_Window] = []
        for number, (begin, end) in enumerate(standing):
            before = bisect_right(stops, begin, hi=len(around) - 1) - 1
            behind = bisect_left(starts, end, lo=1)
            first, left, last, right = around[before] + 1, stops[before], around[behind], starts[behind]
            if windows and windows[-1].first == first:
                windows[-1] = replace(windows[-1], texts=(*windows[-1].texts, number))
            else:
                windows.append(_Window(left, right, first, last, (number,)))
        return windows

    def _tokens_of(self, text: str) -> _Tokens:
        encoded = self._tokenizer(
            text, add_special_tokens=self.add_special_tokens, return_offsets_mapping=True
        )
        number = len(encoded["input_ids"]) - self._num_appended
        return _Tokens(encoded["input_ids"][:number], encoded["offset_mapping"][:number])

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=self.add_special_tokens)["input_ids"]
        return ids[: len(ids) - self._num_appended]

    def _count_appended(self) -> int:
        """Tokens that the tokenizer's own rule for single texts adds behind them."""
        alone = self._tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]
        whole = self._tokenizer(_QUESTION)["input_ids"]
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return len(whole) - len(alone) - start
        return 0

    def _added(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._added_ids]

    def _text_ids(self, text: str, *, begins: bool) -> _Tokens:
        """Without added tokens, of a text's beginning or of what stands within one."""
        bare = self._bare if begins or self._bare_within is None else self._bare_within
        encoded = bare.encode(text, add_special_tokens=False)
        if self._added(encoded.ids):
            found = self._tokenizer.convert_ids_to_tokens(self._added(encoded.ids))
            raise DataError(
                f"{shortened(text)!r} holds {found}, which this tokenizer cannot write as plain text"
            )
        return _Tokens(encoded.ids, encoded.offsets)

    def _end_of_turn(self) -> int:
        """The added token that the template writes after an answer, or else the tokenizer's end of text."""
        ids = self._tokenizer(self.template.first.tail.lstrip(), add_special_tokens=False)["input_ids"]
        if ids and ids[0] in self._added_ids:
            return ids[0]
        if self._tokenizer.eos_token_id is None:
            raise RecipeError(
                f"{self._tokenizer.name_or_path}: neither chat template nor tokenizer ends a turn"
            )
        return self._tokenizer.eos_token_id

    def _of_layout(self, layout: Layout) -> _Known:
        if layout not in self._known:
            if len(self._known) >= MAX_SHAPES:
                self._known.clear()
            text = layout.text(_words(layout))
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            begin = max((end for i, (_, end) in pairs if i in self._added_ids), default=0)
            self._known[layout] = _Known(self._added(self._encode(text)), text[begin:], begins=begin == 0)
        return self._known[layout]


def _words(layout: Layout) -> list[str]:
    """Texts without markers in the place of a conversation's."""
    return [_QUESTION] * len(layout.owners)


def _window_text(
    prompt: Prompt, standing: Sequence[tuple[int, int]], window: _Window
) -> tuple[str, list[tuple[int, int]]]:
    """A window with the texts themselves in the words' places, and where they are."""
    text, spans, place = "", [], window.begin
    for number in window.texts:
        begin, end = standing[number]
        text += prompt.text[place:begin]
        spans.append((len(text), len(text) + len(prompt.texts[number])))
        text += prompt.texts[number]
        place = end
    return text + prompt.text[place : window.end], spans


def _by_turn(prompt: Prompt, found: dict[int, Answered]) -> list[Answered]:
    """One for each turn, from its first text to its last."""
    turns: dict[int, list[Answered]] = {}
    for number, one in sorted(found.items()):
        turns.setdefault(prompt.layout.owners[number], []).append(one)
    return [Answered(parts[0].begin, parts[-1].end, parts[-1].end_of_turn) for parts in turns.values()]


def _stretch(places: Sequence[int | None], first: int, last: int, *, where: str) -> tuple[int, int]:
    """Where the tokens [first, last) of a text are, once its pictures were expanded: [begin, end).

    Raises   DataError  naming ``where``, when they are not there, one after the other
    """
    begin = places[first] if first < last else None
    if begin is None or list(places[first:last]) != list(range(begin, begin + last - first)):
        raise DataError(
            f"{where}: this model's processor changes the prompt's text: earlier answers and texts with markers have "
            "no place in it"
        )
    return begin, begin + last - first


def without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The same normalizer, pre-tokenizer and model, to which every marker is text."""
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    if backend.normalizer is not None:
        bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    return bare


def _within(bare: Tokenizer) -> Tokenizer | None:
    """For what stands within a text, where the pre-tokenizer writes a blank before its beginning alone; else None."""
    if bare.pre_tokenizer is None:
        return None
    state = bare.pre_tokenizer.__getstate__()
    changed = state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"')
    if changed == state:
        return None
    found = Tokenizer(bare.model)
    if bare.normalizer is not None:
        found.normalizer = bare.normalizer
    pre_tokenizer = deepcopy(bare.pre_tokenizer)
    pre_tokenizer.__setstate__(changed)
    found.pre_tokenizer = pre_tokenizer
    return found


def _written_as_text(tokenizer: Any, bare: Tokenizer) -> set[int]:
    """Added tokens that are not special and that the model without added tokens writes for their text as well."""
    plain = {i: one.content for i, one in tokenizer.added_tokens_decoder.items() if not one.special}
    return {i for i, text in plain.items() if bare.encode(text, add_special_tokens=False).ids == [i]}


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that ordinary text may get, though it is an added token: what the model cannot spell.

    Not ``tokenizer.unk_token_id``: Qwen3.5 declares one, ``<|endoftext|>``, that its model never gives.
    """
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, Unigram):
        return tokenizer.unk_token_id
    return tokenizer.backend_tokenizer.token_to_id(model.unk_token or "")
