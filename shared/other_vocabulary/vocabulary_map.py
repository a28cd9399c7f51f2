"""With which of the student's ids the text of each of the teacher's begins.

    vocabulary = VocabularyMap(teacher_tokenizer, student_tokenizer, end_of_turn=(teacher_id, student_id))
    vocabulary.first_ids(ids_S, lead_S)         # ids of the student, or -1

The student's own tokenizer cuts the text, behind other text, so that it writes no blank of its own in front.  What it
makes of it is spelled again and compared: where that is not the text, there is no id.  Ids are looked up when they
are first asked for, as of a large vocabulary most never are.

Legend: V ids of the teacher, L leads, S entries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.data.prompts import without_added_tokens
from shared.other_vocabulary.token_bytes import BYTE_LEVEL, TokenBytes, spelling_kind

NO_ID = -1
_NOT_ASKED = -2
AS_IS, WITHOUT_BLANK, WITH_BLANK = 0, 1, 2  # leads: what the student has of a blank in front of an answer
NUM_LEADS = 3
ANCHORS = ("", "\n", "0", "a", ".")  # texts behind which a text is cut, the first that stays apart from it
BATCH = 16384  # texts that are tokenized together: each takes about a kilobyte meanwhile


class VocabularyMap:
    """Picklable, so that it can work in data-loader workers; each keeps what it has looked up."""

    def __init__(
        self,
        teacher: PreTrainedTokenizerBase,
        student: PreTrainedTokenizerBase,
        *,
        end_of_turn: tuple[int, int],
    ) -> None:
        """end_of_turn  the teacher's id and the student's: they stand for each other

        Raises   RecipeError  for a tokenizer whose tokens are not stretches of the text's bytes
        """
        self.teacher, self.student = TokenBytes.of(teacher), TokenBytes.of(student)
        self._cutter = _Cutter(student, self.student)
        self._first_LV = np.full((NUM_LEADS, len(self.teacher)), _NOT_ASKED, np.int32)
        self._first_LV[:, end_of_turn[0]] = end_of_turn[1]

    def first_ids(self, ids_S: np.ndarray, lead_S: np.ndarray | int = AS_IS) -> np.ndarray:
        """(S,) int32, for ids of the teacher, and leads: a blank more or less in front of each; ``NO_ID``: none"""
        found_S = self._first_LV[lead_S, ids_S]
        if (found_S == _NOT_ASKED).any():
            self._look_up(np.unique(lead_S) if isinstance(lead_S, np.ndarray) else [lead_S], np.unique(ids_S))
            found_S = self._first_LV[lead_S, ids_S]
        return np.asarray(found_S)

    def _look_up(self, leads: Sequence[int] | np.ndarray, ids: np.ndarray) -> None:
        for lead in leads:
            asked = ids[self._first_LV[lead, ids] == _NOT_ASKED].tolist()
            texts = [_with_lead(self.teacher[number], lead) for number in asked]
            known = self._cutter.first_ids({text for text in texts if text is not None})
            self._first_LV[lead, asked] = [NO_ID if text is None else known[text] for text in texts]


def _with_lead(text: bytes | None, lead: int) -> bytes | None:
    """None where there is no such text."""
    if text is None or lead == AS_IS:
        return text
    if lead == WITH_BLANK:
        return b" " + text
    return text[1:] if text[:1] == b" " and len(text) > 1 else None


class _Cutter:
    """The student's tokenizer, as it cuts text behind other text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelling: TokenBytes) -> None:
        self._bare = without_added_tokens(tokenizer)
        self._spelling = spelling
        self._is_byte_level = spelling_kind(json.loads(tokenizer.backend_tokenizer.to_str())) == "byte-level"
        heads = [(anchor, self._bare.encode(anchor, add_special_tokens=False).ids) for anchor in ANCHORS]
        self._heads = [(anchor, head) for anchor, head in heads if head or not anchor]

    def first_ids(self, texts: set[bytes]) -> dict[bytes, int]:
        """The id that each text begins with; ``NO_ID`` where there is none."""
        found = dict.fromkeys(texts, NO_ID)
        whole: dict[bytes, str] = {}
        for text in sorted(texts):
            try:
                whole[text] = text.decode()
            except UnicodeDecodeError:
                found[text] = self._first_of_broken(text)
        for anchor, head in self._heads:
            left = [text for text in whole if found[text] == NO_ID]
            for start in range(0, len(left), BATCH):
                some = left[start : start + BATCH]
                encoded = self._bare.encode_batch(
                    [anchor + whole[text] for text in some], add_special_tokens=False
                )
                for text, one in zip(some, encoded, strict=True):
                    found[text] = self._first_behind(head, one.ids, text)
        return found

    def _first_behind(self, head: Sequence[int], ids: Sequence[int], text: bytes) -> int:
        """The id behind the head, if what stands there spells the text."""
        rest = ids[len(head) :]
        if list(ids[: len(head)]) != list(head) or not rest:
            return NO_ID
        spelled = self._spelling.each(rest)
        return rest[0] if spelled is not None and b"".join(spelled) == text else NO_ID

    def _first_of_broken(self, text: bytes) -> int:
        """Of bytes that are no whole characters, which only a byte-level model can be asked.

        Elsewhere the whole characters in front are cut, or else the first byte is a token by itself, if there is one.
        """
        if self._is_byte_level:
            tokens = self._bare.model.tokenize("".join(BYTE_LEVEL[byte] for byte in text))
            return self._first_behind([], [token.id for token in tokens], text)
        try:
            text.decode()
        except UnicodeDecodeError as error:
            if error.start > 0:
                return self.first_ids({text[: error.start]})[text[: error.start]]
        token = self._bare.token_to_id(f"<0x{text[0]:02X}>")
        return NO_ID if token is None or self._spelling[token] != text[:1] else token
