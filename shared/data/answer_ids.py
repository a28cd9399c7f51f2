"""Answers that a model wrote: the token ids beside their text, and whether the model ended them.

    ids, is_whole = given_ids({"answer_ids": [17, 4, 92], "answer_end": False}, where="train, row 17")
    rules = WrittenIds(tokenizer, end_of_turn=2, placeholders=["<|image_pad|>"])
    rules.require(ids, text, where="train, row 17")

What a model wrote is not always how its tokenizer would cut the text.  Ids are those of a row's last answer, without
the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.data.conversations import place_of_another_tool
from shared.data.texts import is_visible
from shared.errors import DataError, shortened

ANOTHER_TOKENIZER = "They may be another tokenizer's: set data.columns.answer_ids to null to learn the text"


def given_ids(value: Mapping[str, Any], *, where: str) -> tuple[tuple[int, ...] | None, bool]:
    """A row's ids, None where it has none, and whether its last answer is whole.

    value      of the row, by field
    Raises     DataError  naming the row, for what is no list of whole numbers, or no true or false; and for ids
                          beside a list of answers
    """
    ids, is_whole = value.get("answer_ids"), value.get("answer_end")
    if is_whole is not None and not isinstance(is_whole, bool):
        raise DataError(
            f"{where}: answer_end is {shortened(repr(is_whole))}; needed is true (the model ended its answer), false "
            "(it was cut) or null"
        )
    if ids is None:
        return None, is_whole is not False
    if isinstance(value.get("answer"), list | Mapping):
        raise DataError(
            f"{where}: answer_ids beside a list of answers (data.answers majority): which of them is meant is "
            "not said. Set data.columns.answer_ids to null"
        )
    if not isinstance(ids, list):
        raise DataError(f"{where}: answer_ids is a {type(ids).__name__}; needed is a list of token ids")
    if not ids:
        raise DataError(
            f"{where}: answer_ids is empty; needed is at least one token id, or null where the text alone counts"
        )
    for place, one in enumerate(ids):
        if type(one) is not int:
            raise DataError(
                f"{where}: answer_ids holds {shortened(repr(one))} at place {place}; needed are whole numbers"
            )
    return tuple(ids), is_whole is not False


class WrittenIds:
    """Which ids an answer may be made of: ordinary tokens, and added ones that are no control tokens.

    ``num_answer_ids`` is one more than the largest id that is no picture's placeholder.

    end_of_turn   is said by ``answer_end``, not by an id
    placeholders  what a processor takes for a picture
    spelled       an added token that ordinary text may give all the same, such as the unknown one; None: none
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_of_turn: int,
        placeholders: Sequence[str],
        spelled: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_ids = max(tokenizer.get_vocab().values()) + 1
        self._end_of_turn = end_of_turn
        controls = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
        pictures = {tokenizer.get_vocab()[one] for one in placeholders if one in tokenizer.get_vocab()}
        self.refused = frozenset((controls | pictures | {end_of_turn}) - {spelled})
        self.num_answer_ids = max(set(tokenizer.get_vocab().values()) - pictures) + 1

    def text(self, ids: Sequence[int]) -> str:
        """What the ids say, nothing left out, blanks at the ends removed."""
        return self._decoded(ids, clean=False)

    def why_unusable(self, text: str) -> str | None:
        """Why a text that a model wrote cannot be a row's answer; None: it can."""
        if not text:
            return "the answer is empty"
        if place := place_of_another_tool(text, "assistant"):
            return (
                f"the answer says {shortened(repr(place))}, which another tool replaces by what it stands for"
            )
        return None if is_visible(text) else "the answer has no visible character"

    def require(self, ids: Sequence[int], text: str, *, where: str) -> None:
        """Raises   DataError  naming ``where``, for ids that are no answer of this tokenizer, or not that text's"""
        for place, one in enumerate(ids):
            if not self._is_known(one):
                raise DataError(
                    f"{where}: answer_ids holds {shortened(str(one))} at place {place}, which is none of this "
                    f"tokenizer's ids (0 to {self._num_ids - 1}). {ANOTHER_TOKENIZER}"
                )
            if one in self.refused:
                raise DataError(f"{where}: answer_ids holds {one} at place {place}, {self._why_refused(one)}")
        written = [self._decoded(ids, clean=clean) for clean in (False, True)]
        if text.strip() not in written:
            raise DataError(
                f"{where}: answer_ids say {shortened(repr(written[0]))}, the answer's text is "
                f"{shortened(repr(text))}; they must be the same. {ANOTHER_TOKENIZER}"
            )

    def _is_known(self, one: int) -> bool:
        is_within = 0 <= one < self._num_ids
        return is_within and self._tokenizer.backend_tokenizer.id_to_token(one) is not None

    def _why_refused(self, one: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(one)
        if one == self._end_of_turn:
            return f"{name}, which ends the turn. Leave it out: answer_end says whether the answer is whole"
        return f"{name}, a control token or a picture's placeholder, which no answer may hold"

    def _decoded(self, ids: Sequence[int], *, clean: bool) -> str:
        """``clean``: with the blanks before punctuation taken out, as some tokenizers do by themselves."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=clean)).strip()
