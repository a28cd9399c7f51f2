"""What ``check`` finds in a split: every row is read once, every picture's header, and what stands out is listed.

    found = look_at(recipe.data, "train", processor)
    found.reasons, found.num_duplicates, found.doubtful, found.longest

Pictures are decoded up to ``MAX_DECODED`` a split, spread evenly; the report says how many that were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from shared.cache.index import as_key_array
from shared.data.images import decode_rgb, doubt, require_header
from shared.data.processing import KEY_BYTES, Counted, ExampleProcessor
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError
from shared.recipes import DataConfig, Split

MAX_DECODED = 1000
NUM_MEASURED = 4  # of the longest examples: their tokens are counted, pictures and all
NUM_LOOKED_BESIDE = 8  # rows whose unused columns are looked at
_BARE_CHOICE = re.compile(r"\(?([A-Ja-j]|\d)\)?\.?")
_LISTED_TEXT = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)


@dataclass
class SplitFound:
    """The rows of a split.

    reasons    one for each row that cannot be used
    forms, num_pictures, num_turns  how many usable rows are of a form, have so many pictures, so many answers
    num_outvoted  answers that are not used, of rows that hold lists of them
    num_with_ids, num_unended  rows that say their answer's token ids; whose answer was cut by its writer
    num_written   rows whose answer a model wrote
    num_bare      rows whose answer is a number or letter of a choice, and no more
    num_listed    rows whose answer is a text that reads as a list of texts: ``['a', 'b']``
    beside        columns that are not used and seem to hold pictures, of rows that have others
    spelled       added tokens that answers say as texts -> rows where they do; empty without a processor
    keys       (n, 16) uint8, of the usable ones, in order; empty without a processor, as all that follows
    positions  (n,) int64, answer tokens and the end of the turn
    lengths    (n,) int64, tokens of the whole example; exact for the longest
    pixels     (n,) int64, about so many that a vision tower sees of its pictures
    doubtful   pictures that are used, and show next to nothing
    """

    split: VqaSplit
    reasons: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8))
    num_usable: int = 0
    num_decoded: int = 0
    doubtful: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    num_pictures: Counter[int] = field(default_factory=Counter)
    num_turns: Counter[int] = field(default_factory=Counter)
    num_outvoted: int = 0
    num_with_ids: int = 0
    num_unended: int = 0
    num_written: int = 0
    num_bare: int = 0
    num_listed: int = 0
    beside: dict[str, None] = field(default_factory=dict)
    spelled: Counter[str] = field(default_factory=Counter)
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_cut: int = 0

    def count(self, example: Example) -> None:
        """What a usable row is like."""
        self.forms[example.form] += 1
        self.num_pictures[len(example.images)] += 1
        self.num_turns[sum(turn.role == "assistant" for turn in example.turns)] += 1
        self.num_outvoted += example.num_outvoted
        self.num_with_ids += example.answer_ids is not None
        self.num_unended += not example.answer_end
        self.num_written += bool(example.written_by)
        self.num_bare += _BARE_CHOICE.fullmatch(example.answer) is not None
        self.num_listed += _LISTED_TEXT.fullmatch(example.answer) is not None

    @property
    def num_duplicates(self) -> int:
        return len(self.keys) - len(np.unique(as_key_array(self.keys)))

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
    decoded, looked_beside = _spread(MAX_DECODED, split), _spread(NUM_LOOKED_BESIDE, split)
    counted: list[Counted] = []
    keys = bytearray()
    num_picture_tokens: list[int] = []
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
                counted.append(processor.count(example))
        except DataError as error:
            found.reasons.append(str(error))
            continue
        found.num_usable += 1
        found.count(example)
        if row in looked_beside and example.images:
            with suppress(DataError):  # of columns that nobody needs
                found.beside.update(dict.fromkeys(split.seen_beside(row)))
        found.rows.append(row)
        if processor is not None:
            keys += processor.key(example)
            found.spelled.update(set(processor.spelled_out(example)))
            num_picture_tokens.append(processor.picture_tokens(example))
    if processor is not None and found.rows:
        found.keys = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        found.positions = np.array([one.num_positions for one in counted], np.int64)
        found.num_cut = sum(one.num_cut for one in counted)
        found.lengths = np.array([one.num_tokens for one in counted], np.int64) + num_picture_tokens
        _measure(found, processor, np.array(num_picture_tokens, np.int64))
    return found


def _spread(number: int, split: VqaSplit) -> set[int]:
    """So many rows of a split, evenly; all of one that has fewer."""
    number = min(number, len(split))
    return set((np.arange(number) * len(split) // max(number, 1)).tolist())


def count_positions(split: VqaSplit, rows: Sequence[int] | np.ndarray, processor: ExampleProcessor) -> int:
    """Answer tokens and ends of turns of these rows, which are readable."""
    return sum(processor.count(split[int(row)]).num_positions for row in rows)


def _measure(found: SplitFound, processor: ExampleProcessor, picture_tokens: np.ndarray) -> None:
    """Counts the longest examples in full, and takes what that shows of template and pictures for the others."""
    template = None
    found.pixels = np.zeros_like(found.lengths)
    for place in np.argsort(found.lengths, kind="stable")[::-1][:NUM_MEASURED].tolist():
        try:
            one = processor.encode(found.split[found.rows[place]])
        except DataError as error:
            if str(error) not in found.reasons:
                found.reasons.append(str(error))
            continue
        exact = len(one.input_ids)
        if not found.pixels.any() and picture_tokens[place]:
            shown = picture_tokens * (processor.pixels(one) / picture_tokens[place])
            found.pixels = np.rint(shown).astype(np.int64)
        if template is None:
            template = exact - int(found.lengths[place])
            found.lengths += template
        found.lengths[place] = exact
