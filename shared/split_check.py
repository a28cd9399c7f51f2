"""What ``check`` finds in a split: every row is read once, every picture's header, and what stands out is listed.

    found = look_at(recipe.data, "train", processor)
    found.reasons, found.num_duplicates, found.doubtful, found.longest

Pictures are decoded up to ``MAX_DECODED`` a split, spread evenly; the report says how many that were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.data.images import decode_rgb, doubt, require_header
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError
from shared.recipes import DataConfig, Split

MAX_DECODED = 1000
NUM_MEASURED = 4  # of the longest examples: their tokens are counted, pictures and all
BATCH = 1024  # texts that are tokenized together


@dataclass
class SplitFound:
    """The rows of a split.

    reasons    one for each row that cannot be used
    forms, num_pictures, num_turns  how many usable rows are of a form, have so many pictures, so many answers
    num_outvoted  answers that are not used, of rows that hold lists of them
    keys       of the usable ones, in order; empty without a processor, as all that follows
    positions  (n,) int64, answer tokens and the end of the turn
    lengths    (n,) int64, tokens of the whole example; exact for the longest
    doubtful   pictures that are used, and show next to nothing
    """

    split: VqaSplit
    reasons: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_usable: int = 0
    num_decoded: int = 0
    doubtful: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    num_pictures: Counter[int] = field(default_factory=Counter)
    num_turns: Counter[int] = field(default_factory=Counter)
    num_outvoted: int = 0
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_cut: int = 0

    def count(self, example: Example) -> None:
        """What a usable row is like."""
        self.forms[example.form] += 1
        self.num_pictures[len(example.images)] += 1
        self.num_turns[sum(turn.role == "assistant" for turn in example.turns)] += 1
        self.num_outvoted += example.num_outvoted

    @property
    def num_duplicates(self) -> int:
        return len(self.keys) - len(set(self.keys))

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 where none was counted."""
        return int(self.lengths.max(initial=0))

    def require_short(self, max_tokens: int | None, *, model: str) -> None:
        """Raises   DataError  naming the longest row, when examples are longer than the model's context"""
        too_long = np.flatnonzero(self.lengths > (max_tokens or np.inf))
        if len(too_long):
            worst = int(self.lengths.argmax())
            raise DataError(
                f"{self.split.source}, split {self.split.name}: {len(too_long)} row(s) have more tokens than the "
                f"context of {model}, {max_tokens:,}; row {self.rows[worst]} has {self.longest:,}. Lower "
                "data.max_pixels or data.max_answer_tokens, or take these rows out"
            )


def look_at(data: DataConfig, name: Split, processor: ExampleProcessor | None) -> SplitFound:
    """Reads every row.  Raises   DataError  when the split cannot be opened"""
    split = open_split(data, name)
    found = SplitFound(split)
    num_decoded = min(MAX_DECODED, len(split))
    decoded = set((np.arange(num_decoded) * len(split) // max(num_decoded, 1)).tolist())
    texts = _Texts(processor, data.max_answer_tokens)
    for row in range(len(split)):
        try:
            example = split[row]
            if row in decoded:
                found.num_decoded += 1
                for image in example.images:
                    picture = decode_rgb(image, background=data.background, where=example.where)
                    if (what := doubt(picture)) is not None:
                        found.doubtful.append(f"{example.where}: {what}")
            else:
                for image in example.images:
                    require_header(image, where=example.where)
            if processor is not None:
                processor.require_usable(example)
        except DataError as error:
            found.reasons.append(str(error))
            continue
        found.num_usable += 1
        found.count(example)
        found.rows.append(row)
        if processor is not None:
            found.keys.append(processor.key(example))
            texts.add(example)
    if processor is not None and found.rows:
        found.positions, found.num_cut, found.lengths = texts.counts()
        _measure(found, processor)
    return found


def count_positions(
    split: VqaSplit, rows: Sequence[int] | np.ndarray, data: DataConfig, processor: ExampleProcessor
) -> int:
    """Answer tokens and ends of turns of these rows, which are readable."""
    texts = _Texts(processor, data.max_answer_tokens)
    for row in rows:
        texts.add(split[int(row)])
    return int(texts.counts()[0].sum())


class _Texts:
    """Counts tokens of questions and answers, many texts at a time, and holds no picture."""

    def __init__(self, processor: ExampleProcessor | None, max_answer_tokens: int) -> None:
        self._processor, self._max_answer_tokens = processor, max_answer_tokens
        self._pending: list[str] = []
        self._counts: list[int] = []  # tokens of each text
        self._owners: list[int] = []  # its example
        self._are_learned: list[bool] = []
        self._pictures: list[int] = []

    def add(self, example: Example) -> None:
        assert self._processor is not None
        for turn, is_learned in self._processor.learned(example):
            texts = [part for part in turn.parts if part is not None]
            self._pending += texts
            self._owners += [len(self._pictures)] * len(texts)
            self._are_learned += [is_learned] * len(texts)
        self._pictures.append(self._processor.picture_tokens(example))
        if len(self._pending) >= BATCH:
            self._count()

    def counts(self) -> tuple[np.ndarray, int, np.ndarray]:
        """Answer positions of each example, how many answers are cut, and tokens without those of the template."""
        if self._pending:
            self._count()
        tokens, learned = np.array(self._counts, np.int64), np.array(self._are_learned, bool)
        limit = self._max_answer_tokens
        labels = np.where(learned, np.where(tokens > limit, limit, tokens + 1), 0)
        owners, number = np.array(self._owners, np.int64), len(self._pictures)
        positions, rest = (
            np.bincount(owners, values, number).astype(np.int64)
            for values in (labels, np.where(learned, 0, tokens))
        )
        num_cut = int((learned & (tokens > limit)).sum())
        return positions, num_cut, positions + rest + np.array(self._pictures, np.int64)

    def _count(self) -> None:
        assert self._processor is not None
        ids = self._processor.tokenizer(self._pending, add_special_tokens=False)["input_ids"]
        self._counts += map(len, ids)
        self._pending.clear()


def _measure(found: SplitFound, processor: ExampleProcessor) -> None:
    """Counts the longest examples in full, and adds what that shows of the template's tokens to the others."""
    template = None
    for place in np.argsort(found.lengths, kind="stable")[::-1][:NUM_MEASURED].tolist():
        try:
            exact = len(processor.encode(found.split[found.rows[place]]).input_ids)
        except DataError as error:
            if str(error) not in found.reasons:
                found.reasons.append(str(error))
            continue
        if template is None:
            template = exact - int(found.lengths[place])
            found.lengths += template
        found.lengths[place] = exact
