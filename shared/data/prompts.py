"""A chat template and a tokenizer become the token ids around a question and an answer.

    prompt = ChatPrompt(tokenizer, template, system_prompt=None)
    prompt.text("Which plane is this?")     # what the processor turns into prompt tokens
    prompt.answer_ids("Axial")              # the labels, before the end of the turn
    prompt.end_of_turn                      # the label after them

The template is rendered once, with words in place of question and answer that no template treats specially;
so what it does with a text (trimming, searching for tags) cannot depend on the data.

**Chat markers stand for themselves.**  A question that holds ``<|im_end|>``, or any other added token, must
not end the turn.  Such a text is tokenized without the added tokens, piecewise between those of the template;
texts without markers take the ordinary path, and both paths agree on them (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from shared.errors import DataError, RecipeError, shortened

PROMPT_VERSION = 1  # of the rules in this module; changes the keys of examples

_QUESTION, _ANSWER = "teachoncequestion", "teachonceanswer"


@dataclass(frozen=True)
class _Render:
    """A template's text with its gaps."""

    before: str  # up to the question
    after: str  # from the question to where the answer begins
    lead: str  # blanks between the generation prompt and the answer, if any
    tail: str  # what follows an answer


@dataclass(frozen=True)
class _Window:
    """The stretch of a prompt between the template's added tokens that holds the question."""

    before: str
    after: str
    num_tokens_before: int  # of the whole prompt with the stand-in for a question
    stand_in_ids: tuple[int, ...]
    num_tokens_after: int


class ChatPrompt:
    """The fixed parts of a prompt, and the two ways of tokenizing what lies between them.

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
        placeholders: Sequence[str] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise RecipeError(
                f"tokenizer {type(tokenizer).__name__} has no tokenizer.json; markers in the data cannot be "
                "kept apart from the template's. Convert it to a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._bare = _without_added_tokens(tokenizer)
        self._added_ids = set(tokenizer.added_tokens_decoder) - {_unknown_id(tokenizer)}
        self._render = _render(tokenizer, template, system_prompt, placeholders)
        bos = tokenizer.bos_token
        self.add_special_tokens = not (bos is not None and self._render.before.lstrip().startswith(bos))
        self._num_appended = self._count_appended() if self.add_special_tokens else 0
        self._skeleton = self._added(self._encode(self.text(_QUESTION)))
        self._window = self._find_window()
        self.end_of_turn = self._end_of_turn()
        self._turn = self._after_last_added(self.text(_QUESTION))

    def changed_rules(self) -> dict[str, object]:
        """What was once done otherwise, where it matters for this tokenizer: part of the keys of examples."""
        changed: dict[str, object] = {}
        if self._num_appended:
            changed["appended"] = self._num_appended
        bos = self._tokenizer.bos_token
        if (
            bos is not None
            and self._render.before.lstrip().startswith(bos)
            and not self._render.before.startswith(bos)
        ):
            changed["bos"] = "behind blanks"
        return changed

    def text(self, question: str) -> str:
        """The prompt up to where the answer begins."""
        return self._render.before + question + self._render.after

    def stand_in_text(self) -> str:
        """A prompt whose question holds no marker, for ``put_in``."""
        return self.text(_QUESTION)

    def holds_marker(self, question: str) -> bool:
        """Whether the tokenizer would see an added token that the template did not write."""
        return self._added(self._encode(self.text(question))) != self._skeleton

    def without_appended(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Removes what the tokenizer writes after any text, such as an end of text: here the answer follows.

        Shapes   tokens: (1, S, ...) each, a processed ``text(...)``
        """
        return {name: value[:, : value.shape[1] - self._num_appended] for name, value in tokens.items()}

    def put_in(self, question: str, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Puts a question that holds markers in place of the stand-in.

        Shapes   tokens: (1, S) each, ``input_ids`` among them: a processed ``stand_in_text()``, its image
                 placeholders expanded
        Returns  the same with another S; what else is known of the stand-in's tokens holds for the question's
        """
        window = self._window
        ids = self._text_ids(window.before + question + window.after)
        given = tokens["input_ids"][0].tolist()
        start = _where(given, window)
        stop = start + len(window.stand_in_ids)
        parts = {}
        for name, value in tokens.items():
            middle = torch.tensor(ids) if name == "input_ids" else value[0, start].repeat(len(ids))
            parts[name] = torch.cat([value[0, :start], middle.to(value.dtype), value[0, stop:]])[None]
        return parts

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's token ids as they follow the prompt; markers in it are spelled out."""
        before = self._text_ids(self._turn)
        joined = self._text_ids(self._turn + self._render.lead + answer)
        if joined[: len(before)] == before:
            return joined[len(before) :]
        return self._text_ids(self._render.lead + answer)

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

    def _text_ids(self, text: str) -> list[int]:
        ids = self._bare.encode(text, add_special_tokens=False).ids
        if self._added(ids):
            found = self._tokenizer.convert_ids_to_tokens(self._added(ids))
            raise DataError(
                f"{shortened(text)!r} holds {found}, which this tokenizer cannot write as plain text"
            )
        return ids

    def _find_window(self) -> _Window:
        text = self.text(_QUESTION)
        start, stop = len(self._render.before), len(self._render.before) + len(_QUESTION)
        encoded = self._tokenizer(
            text, add_special_tokens=self.add_special_tokens, return_offsets_mapping=True
        )
        num_tokens = len(encoded["input_ids"]) - self._num_appended
        ids, offsets = encoded["input_ids"][:num_tokens], encoded["offset_mapping"][:num_tokens]
        added = [(n, *offsets[n]) for n, i in enumerate(ids) if i in self._added_ids]
        first, left = max(((n + 1, end) for n, _, end in added if end <= start), default=(0, 0))
        last, right = min(
            ((n, begin) for n, begin, _ in added if begin >= stop), default=(len(ids), len(text))
        )
        return _Window(text[left:start], text[stop:right], first, tuple(ids[first:last]), len(ids) - last)

    def _end_of_turn(self) -> int:
        """The added token that the template writes after an answer, or else the tokenizer's end of text."""
        ids = self._tokenizer(self._render.tail.lstrip(), add_special_tokens=False)["input_ids"]
        if ids and ids[0] in self._added_ids:
            return ids[0]
        if self._tokenizer.eos_token_id is None:
            raise RecipeError(
                f"{self._tokenizer.name_or_path}: neither chat template nor tokenizer ends a turn"
            )
        return self._tokenizer.eos_token_id

    def _after_last_added(self, text: str) -> str:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return text[max((end for i, (_, end) in pairs if i in self._added_ids), default=0) :]


def _without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The same normalizer, pre-tokenizer and model, to which every marker is text."""
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    if backend.normalizer is not None:
        bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    return bare


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that ordinary text may get, though it is an added token: what the model cannot spell.

    Not ``tokenizer.unk_token_id``: Qwen3.5 declares one, ``<|endoftext|>``, that its model never gives.
    """
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, Unigram):
        return tokenizer.unk_token_id
    return tokenizer.backend_tokenizer.token_to_id(model.unk_token or "")


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    system_prompt: str | None,
    placeholders: Sequence[str],
) -> _Render:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
    system = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    prompt = [user] if system_prompt is None else [system, user]
    options: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in template else {}

    def rendered(messages: list[dict[str, Any]], *, ask: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask, **options
        )
        return str(text)

    try:
        asked, answered = rendered(prompt, ask=True), rendered([*prompt, answer], ask=False)
    except Exception as error:  # templates raise errors of their own
        raise RecipeError(
            f"chat template of {tokenizer.name_or_path}: {type(error).__name__}: {error}"
        ) from error
    if asked.count(_QUESTION) != 1 or answered.count(_ANSWER) != 1:
        raise RecipeError(
            f"chat template of {tokenizer.name_or_path}: question and answer must each stand once in its "
            f"text, found {asked.count(_QUESTION)} and {answered.count(_ANSWER)}"
        )
    textual = [*prompt[:-1], user | {"content": user["content"][1:]}]
    if (
        placeholders
        and not any(placeholder in asked for placeholder in placeholders)
        and _is_blind(asked, lambda: rendered(textual, ask=True))
    ):
        raise RecipeError(
            f"chat template of {tokenizer.name_or_path}: it writes the same text with and without a picture; "
            "needed is one that writes the model's picture placeholder"
        )
    before, after = asked.split(_QUESTION)
    begun, tail = answered.split(_ANSWER)
    lead = begun.removeprefix(asked) if begun.startswith(asked) else ""
    if (
        lead.strip()
    ):  # what is written ahead of each answer, such as an empty thought, is prompt and not label
        after, lead = after + lead, ""
    return _Render(before, after, lead, tail)


def _is_blind(with_picture: str, without_picture: Callable[[], str]) -> bool:
    """Whether a template does not write that there is a picture."""
    try:
        return "".join(with_picture.split()) == "".join(without_picture().split())
    except Exception:  # a template that asks for a picture sees it
        return False


def _where(ids: list[int], window: _Window) -> int:
    """Where the stand-in's tokens begin, wherever the image placeholders were expanded."""
    length = len(window.stand_in_ids)
    for start in (len(ids) - window.num_tokens_after - length, window.num_tokens_before):
        if tuple(ids[start : start + length]) == window.stand_in_ids:
            return start
    raise RecipeError(
        "this model's processor changes the prompt's text; a question with markers cannot be placed"
    )
