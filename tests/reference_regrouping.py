"""Slow and obvious: the targets of a teacher at the positions and ids of a student with another tokenizer.

Everything is strings and dictionaries.  Nothing of the package is used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Sequence as Decoders
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "</s>"
Spell = Callable[[int], bytes]


def byte_level(
    texts: Sequence[str], vocab_size: int, *, add_prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def sentence_piece(texts: Sequence[str], vocab_size: int, *, prepends: bool) -> PreTrainedTokenizerFast:
    """A BPE over characters that falls back to bytes, as Gemma has it, or Llama 2, which puts a blank in front.

    Gemma's has tokens of blanks alone, which are written down as added ones.
    """
    blanks = [] if prepends else ["\u2581\u2581"]
    blank = normalizers.Replace(" ", "\u2581")
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank]) if prepends else blank
    strip = [Strip(" ", 1, 0)] if prepends else []
    made.decoder = Decoders([Replace("\u2581", " "), ByteFallback(), Fuse(), *strip])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *blanks],
        show_progress=False,
        max_token_length=8,
    )
    made.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_are_no_control(made, blanks), eos_token=END, unk_token="<unk>"
    )
    found.add_tokens([AddedToken(one, normalized=False) for one in blanks])
    return found


def _bytes_are_no_control(made: Tokenizer, blanks: Sequence[str]) -> Tokenizer:
    """The trainer writes its special tokens down as added ones; of these only the first two are."""
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:2]
    content["model"]["merges"] += [[one[:1], one[1:]] for one in blanks]
    return Tokenizer.from_str(json.dumps(content))


@cache
def spelled(tokenizer: PreTrainedTokenizerFast) -> Spell:
    """From an id to the bytes that it writes."""
    is_byte_level = isinstance(tokenizer.backend_tokenizer.decoder, ByteLevelDecoder)
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def spell(number: int) -> bytes:
        token = tokenizer.convert_ids_to_tokens(number)
        if is_byte_level:
            return bytes(bytes_of[character] for character in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    return spell


@cache
def first_id(student: PreTrainedTokenizerFast, text: str) -> int | None:
    """The student's first token of a text that stands behind a line's end, which belongs to no other token."""
    behind = student("\n" + text, add_special_tokens=False)["input_ids"]
    spell = spelled(student)
    for place in range(len(behind)):
        head = b"".join(map(spell, behind[:place]))
        if head.lstrip(b" ") == b"\n" and b"".join(map(spell, behind[place:])) == text.encode():
            return int(behind[place])
    return None


def regrouped(
    teacher: PreTrainedTokenizerFast,
    student: PreTrainedTokenizerFast,
    teacher_ids: Sequence[int],
    student_ids: Sequence[int],
    targets: Sequence[dict[int, float]],
) -> list[dict[int, float] | None]:
    """For each label of the student, the end of the turn last, the weights of its ids; None where none is shared.

    targets  weights of the teacher's ids, for each of its labels, the end of the turn last
    """
    of_teacher, of_student = spelled(teacher), spelled(student)
    found: list[dict[int, float] | None] = []
    for place in range(len(student_ids) + 1):
        read = b"".join(map(of_student, student_ids[:place]))
        places = [
            n for n in range(len(teacher_ids) + 1) if b"".join(map(of_teacher, teacher_ids[:n])) == read
        ]
        if not places:
            found.append(None)
            continue
        weights: dict[int, float] = defaultdict(float)
        for number, weight in targets[places[0]].items():
            if number == [*teacher_ids, teacher.eos_token_id][places[0]]:
                weights[[*student_ids, student.eos_token_id][place]] += weight
                continue
            if number == teacher.eos_token_id:
                weights[student.eos_token_id] += weight
                continue
            try:
                first = first_id(student, of_teacher(number).decode())
            except UnicodeDecodeError:
                continue
            if first is not None:
                weights[first] += weight
        found.append(dict(weights))
    return found
