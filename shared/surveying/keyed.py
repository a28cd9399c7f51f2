"""The readable rows of a split with their keys, and about how large each is; pictures are hashed, not decoded.

    keyed = survey_keys(recipe.data, "train", processor, Surveyors.of_capture(recipe))

Stage one plans its units from the keys, stage two its steps.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit, open_split
from shared.errors import DataError
from shared.recipes import DataConfig, Split
from shared.surveying.found import (
    keys_of,
    num_pictures_of,
    own_of,
    picture_tokens_of,
    reasons_of,
    writers_of,
)
from shared.surveying.sharing import Surveyors, survey_rows

MAX_WRITERS, MAX_WRITER = 100, 2000  # named in a manifest; characters of one
NUM_MEASURED = 4  # rows that are tried for the tokens of a template


@dataclass(frozen=True, eq=False)
class Keyed:
    """The readable rows of a split.

    rows        (n,) int64, rows of the split
    keys        (n, 16) uint8, theirs, in order
    lengths     (n,) int64, about so many tokens, the picture's among them: a measure to put like with like
    pixels      (n,) int64, about so many that a vision tower sees of its pictures
    unreadable  (row, reason) of each row that has no usable picture, question or answer
    num_outvoted  answers that are not used, of rows that hold lists of them
    has_pictures  whether any of the rows has one
    written_by  the models that wrote answers of the rows, as these say
    own         (n,) bool, whether a student wrote the row's answer
    own_writers what these rows say of it, in full
    """

    split: VqaSplit
    rows: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray
    unreadable: tuple[tuple[int, str], ...]
    num_outvoted: int = 0
    has_pictures: bool = True
    written_by: tuple[str, ...] = ()
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    own_writers: tuple[str, ...] = ()

    def at(self, places: np.ndarray) -> Keyed:
        """Some of the readable rows, by their places among these, (m,) int64."""
        parts = {name: getattr(self, name)[places] for name in ("rows", "keys", "lengths", "pixels", "own")}
        return replace(self, **parts)

    @property
    def fingerprint(self) -> str:
        """Hex digest over the keys in order."""
        return keys_fingerprint(self.keys)


def keys_fingerprint(keys: np.ndarray) -> str:
    """Hex, over keys of 16 bytes in order, as an array of any shape."""
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


def survey_keys(
    data: DataConfig,
    name: Split,
    processor: ExampleProcessor,
    surveyors: Surveyors | None = None,
    *,
    show: bool = False,
    decode: bool = False,
) -> Keyed:
    """What every row of the split is; called by all ranks, which share the reading.

    surveyors  None: this process alone, and nothing is kept
    show       with a progress bar
    decode     also finds pictures that cannot be decoded, where no capture has found them before
    """
    surveyors = surveyors or Surveyors()
    split = surveyors.world.by_main(lambda: open_split(data, name))
    table = survey_rows(split, processor, surveyors, decode=decode, show=show)
    is_usable = table.column("key").is_valid().to_numpy()
    rows = np.flatnonzero(is_usable)
    usable = table if len(rows) == len(table) else table.filter(pa.array(is_usable))  # which copies
    picture_tokens = picture_tokens_of(usable, processor)
    lengths = usable.column("text_tokens").to_numpy() + picture_tokens
    measured = surveyors.world.by_main(lambda: measure(split, rows, lengths, picture_tokens, processor))
    own, own_writers = own_of(usable)
    return Keyed(
        split=split,
        rows=rows,
        keys=keys_of(usable),
        lengths=lengths + measured.template_tokens,
        pixels=measured.pixels(picture_tokens),
        unreadable=reasons_of(table),
        num_outvoted=int(usable.column("outvoted").to_numpy().sum()),
        has_pictures=num_pictures_of(usable) > 0,
        written_by=told_writers(writers_of(usable)),
        own=own,
        own_writers=own_writers,
    )


def told_writers(writers: Counter[str]) -> tuple[str, ...]:
    """Who wrote answers, in order; of more than ``MAX_WRITERS`` those of most rows, and how many others there are."""
    named = Counter({name[:MAX_WRITER]: number for name, number in writers.items() if name})
    most = sorted(name for name, _ in named.most_common(MAX_WRITERS))
    num_others = len(named) - len(most)
    return (*most, *([f"and {num_others:,} others"] if num_others else []))


@dataclass(frozen=True)
class Measured:
    """What texts and headers of pictures do not tell, as an encoded example has it.

    template_tokens   beside those of the texts and pictures
    pixels_per_token  that a vision tower sees for each token of a picture; 0.0 without pictures
    """

    template_tokens: int = 0
    pixels_per_token: float = 0.0

    def pixels(self, picture_tokens: np.ndarray) -> np.ndarray:
        return np.rint(picture_tokens * self.pixels_per_token).astype(np.int64)


def measure(
    split: VqaSplit,
    rows: np.ndarray,
    lengths: np.ndarray,
    picture_tokens: np.ndarray,
    processor: ExampleProcessor,
) -> Measured:
    """Of the first usable row with a picture, or else of the first one; ``lengths`` are without the template's."""
    with_pictures = np.flatnonzero(picture_tokens)[:NUM_MEASURED].tolist()
    for place in [*with_pictures, *range(min(len(rows), 2 * NUM_MEASURED))][: 2 * NUM_MEASURED]:
        try:
            one = processor.encode(split[int(rows[place])])
        except DataError:  # whoever needs the row says what is wrong with it
            continue
        template_tokens = max(0, len(one.input_ids) - int(lengths[place]))
        return Measured(template_tokens, processor.pixels(one) / max(1, int(picture_tokens[place])))
    return Measured()
