"""What each id of a tokenizer writes, as bytes.

    spelling = TokenBytes.of(tokenizer)
    spelling.joined(ids)        # b" ab\\xe2", or None where one of the ids is no text

A token may end within a character, so its text is bytes.  How a vocabulary spells them is read from the tokenizer's
decoder: byte-level (one character for each byte, as GPT-2 has it) or like SentencePiece (a blank is written as a low
line, and ``<0xE2>`` is a byte where the tokenizer falls back to bytes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from shared.errors import RecipeError

BLANK = "\u2581"  # of SentencePiece
_BYTE = re.compile("<0x([0-9A-F]{2})>")
Spell = Callable[[str], bytes | None]


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of V ids, one after the other.

    Shapes   offsets (V + 1,) int64: id v is ``blob[offsets[v] : offsets[v + 1]]``
             is_text (V,) bool: False for control tokens, the unknown token and ids that do not exist
    """

    blob: bytes
    offsets: np.ndarray
    is_text: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """Raises   RecipeError  for a tokenizer whose tokens are not stretches of the text's bytes"""
        spelled, spelled_if_added = _spelling(tokenizer)
        vocabulary = tokenizer.get_vocab()
        found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        added = tokenizer.added_tokens_decoder
        unknown = tokenizer.backend_tokenizer.model.unk_token if _has_unknown(tokenizer) else None
        for token, number in vocabulary.items():
            if number not in added and token != unknown:
                found[number] = spelled(token)
        for number, one in added.items():
            if not one.special and one.content != unknown:
                found[number] = spelled_if_added(one.content)
        lengths = [len(one or b"") for one in found]
        return cls(
            blob=b"".join(one or b"" for one in found),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            is_text=np.array([one is not None and len(one) > 0 for one in found]),
        )

    def __len__(self) -> int:
        return len(self.is_text)

    def __getitem__(self, number: int) -> bytes | None:
        """None for what is no text."""
        if not (0 <= number < len(self) and self.is_text[number]):
            return None
        return self.blob[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[bytes | None]:
        return (self[number] for number in range(len(self)))

    def each(self, ids: Sequence[int]) -> list[bytes] | None:
        """Of each of the ids; None where one of them is no text."""
        found = [self[number] for number in ids]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None


def _has_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer.backend_tokenizer.model, "unk_token", None) is not None


def _spelling(tokenizer: PreTrainedTokenizerBase) -> tuple[Spell, Spell]:
    """From a token of the vocabulary to its bytes, and from an added one that is text.

    A byte-level tokenizer has its added tokens in plain letters.  The decoder of others reads them as all tokens:
    Gemma's have runs of blanks among them, written as low lines.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spelling_kind(content)
    if kind is None:
        decoder = (content["decoder"] or {}).get("type")
        raise RecipeError(
            f"tokenizer {tokenizer.name_or_path}: with the decoder {decoder} its tokens are not stretches of the "
            "text's bytes, so student.other_vocabulary cannot find where they begin. Needed is a byte-level or "
            "SentencePiece-like tokenizer"
        )
    if kind == "byte-level":
        byte_of = {character: byte for byte, character in BYTE_LEVEL.items()}

        def of_characters(token: str) -> bytes | None:
            found = [byte_of.get(character) for character in token]
            return None if None in found else bytes(found)  # type: ignore[arg-type]  # no None among them

        return of_characters, str.encode
    falls_back = falls_back_to_bytes(content)

    def of_sentence_piece(token: str) -> bytes | None:
        if falls_back and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(BLANK, " ").encode("utf-8", "surrogatepass")

    return of_sentence_piece, of_sentence_piece


def spelling_kind(content: dict[str, Any]) -> Literal["byte-level", "sentencepiece"] | None:
    """From a tokenizer's JSON; None where it is neither."""
    decoders = list(_parts(content["decoder"], "decoders"))
    kinds = {one["type"] for one in decoders}
    if "ByteLevel" in kinds:
        return "byte-level"
    replaced = any(
        one["type"] == "Replace" and one["pattern"] == {"String": BLANK} and one["content"] == " "
        for one in decoders
    )
    # Of a Metaspace, which may write a blank otherwise, the usual one.
    spaced = any(one["type"] == "Metaspace" and one["replacement"] == BLANK for one in decoders)
    return "sentencepiece" if replaced or spaced else None


def falls_back_to_bytes(content: dict[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback"))


def _parts(one: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """Of a sequence, or what stands alone."""
    if one is None:
        return
    if one["type"] != "Sequence":
        yield one
        return
    for part in one[name]:
        yield from _parts(part, name)


def _byte_level() -> dict[int, str]:
    """The character that stands for each byte: printable ones for themselves, then those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    found = {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    assert set(found.values()) == set(ByteLevel.alphabet())
    return found


BYTE_LEVEL = _byte_level()
