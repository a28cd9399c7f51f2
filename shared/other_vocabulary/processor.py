"""The processor of a student whose tokenizer is not its teacher's.

    processor = student_of_another("Qwen/Qwen3.5-4B", recipe.data, teacher)
    processor.key(example)              # the teacher's: rows of the cache are known by it
    processor.encode(example)           # the student's tokens, labels and pixels
    processor.aligned(example)          # which position of the teacher each label belongs to

A row whose answer is given by token ids has those of the teacher, which captured it so: the student learns its text,
without a character at its end that was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shared.data.fingerprints import digest
from shared.data.processing import ExampleProcessor, processor_parts
from shared.data.prompts import Prompt
from shared.data.rows import Example
from shared.errors import DataError
from shared.other_vocabulary.alignment import Alignment, align
from shared.other_vocabulary.vocabulary_map import VocabularyMap
from shared.recipes import DataConfig

REPLACEMENT = "\ufffd"  # what bytes that are no character are read as


@dataclass(frozen=True, eq=False)
class Aligned:
    """An example's labels beside its teacher's.

    teacher_ids  labels that the teacher must have been captured with
    """

    alignment: Alignment
    teacher_ids: list[int]


class StudentOfAnother(ExampleProcessor):
    """A student's way from example to tokens; keys are made with the teacher's tokenizer and template."""

    def __init__(self, processor: Any, *, teacher: ExampleProcessor, **settings: Any) -> None:
        """Raises   RecipeError  as ``ExampleProcessor`` and ``VocabularyMap.of``"""
        super().__init__(processor, **settings)
        self._teacher = teacher
        self.vocabulary = VocabularyMap(
            teacher.tokenizer, self.tokenizer, end_of_turn=(teacher.end_of_turn, self.end_of_turn)
        )
        self.prompt_fingerprint = digest([self.prompt_fingerprint, teacher.prompt_fingerprint])

    @property
    def of_keys(self) -> ExampleProcessor:
        """The teacher's."""
        return self._teacher

    @property
    def date(self) -> str | None:
        """The day that prompts are written for; None where neither template prints one."""
        return super().date or self._teacher.date

    def key(self, example: Example) -> bytes:
        """As the teacher's capture has it."""
        return self._teacher.key(example)

    def require_usable(self, example: Example) -> None:
        """Raises   DataError  naming the row, when a chat template refuses its conversation, or for wrong ids"""
        super().require_usable(example)
        self._teacher.require_usable(example)

    def _written_ids(self, example: Example) -> tuple[int, ...] | None:
        return None

    def _last_answer(self, example: Example, prompt: Prompt) -> tuple[list[int], bool]:
        return super()._last_answer(_without_cut_character(example), prompt)

    def aligned(self, example: Example) -> Aligned:
        """Raises   DataError  naming the row, when its conversation cannot be used, or the two learn others"""
        theirs, own = self._teacher.learned(example), self.learned(example)
        if len(theirs) != len(own):
            raise DataError(
                f"{example.where}: the teacher's template has {len(theirs)} learned answers and the student's "
                f"{len(own)}. Set data.train_on to last, or take the row out"
            )
        ends = (self._teacher.end_of_turn, self.end_of_turn)
        return Aligned(
            align(self.vocabulary, theirs, own, ends=ends),
            [number for one in theirs for number in one.labels(ends[0])],
        )


def _without_cut_character(example: Example) -> Example:
    """Without the replacement characters that stand for the first bytes of one, where a model's answer was cut."""
    if example.answer_ids is None or example.answer_end:
        return example
    text = example.answer
    if not text.endswith(REPLACEMENT):
        return example
    answer = replace(example.turns[-1], parts=(text.rstrip(REPLACEMENT).rstrip(),))
    return replace(example, turns=(*example.turns[:-1], answer))


def student_of_another(
    model: str, data: DataConfig, teacher: ExampleProcessor, *, revision: str | None = None
) -> ExampleProcessor:
    """The processor of a student, whose tokenizer and template may be its teacher's or others.

    Raises   RecipeError  when it cannot be opened, or its tokens are not stretches of a text's bytes
    Holds    where both are the teacher's, it is the ordinary processor: targets are taken as they are
    """
    processor, settings = processor_parts(model, data, revision=revision)
    own = ExampleProcessor(processor, **settings)
    if own.prompt_fingerprint == teacher.prompt_fingerprint:
        return own
    return StudentOfAnother(processor, teacher=teacher, **settings)
