"""The examples that a run will use, known before the first step.

Steps are planned over usable rows, so rows that cannot be used must be known beforehand; and a cache that
lacks a row is better reported now than in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from shared.cache import Cache
from shared.completeness import are_skipped, require_in_the_cache
from shared.data.processing import KEY_BYTES, ExampleProcessor
from shared.data.rows import VqaSplit
from shared.dealing import Work
from shared.errors import DataError, listed
from shared.recipes import DataConfig, Recipe, Split
from shared.runtime import World
from shared.surveying import Keyed, Surveyors, keys_fingerprint, survey_keys
from stage2_student.training.emphasis import Emphasis
from stage2_student.training.feed import MicrobatchSource

MAX_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Survey:
    """The usable examples of a split.

    rows         (num_examples,) int64, rows of the split
    lengths      (num_examples,) int64, about so many tokens, the picture's among them
    pixels       (num_examples,) int64, about so many that a vision tower sees of its pictures
    fingerprint  hex, over the keys in order
    dropped      a reason for each row that was left out
    has_pictures whether any has one
    keys         (num_examples, 16) uint8, of the examples in order
    written_by   the models that wrote answers of the rows
    own          (num_examples,) bool, whether a student wrote the answer
    own_writers  what these rows say of it
    """

    split: VqaSplit
    rows: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray
    fingerprint: str
    dropped: tuple[str, ...]
    has_pictures: bool = True
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8))
    written_by: tuple[str, ...] = ()
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    own_writers: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        return len(self.rows)

    @property
    def own_fingerprint(self) -> str:
        """Hex, over which examples the student wrote answers to."""
        return keys_fingerprint(self.own)

    @property
    def facts(self) -> dict[str, object]:
        """For the run's log: how many examples there are, and what was left out."""
        return {
            "num_examples": self.num_examples,
            "num_dropped": len(self.dropped),
            "dropped": list(self.dropped),
        }

    def notice(self) -> str | None:
        """What the user is told about rows that were left out; None where there are none."""
        if not self.dropped:
            return None
        num_rows = self.num_examples + len(self.dropped)
        listed = "".join(f"\n  - {reason}" for reason in self.dropped[:MAX_REASONS_SHOWN])
        more = len(self.dropped) - MAX_REASONS_SHOWN
        where = f"{self.split.source}, split {self.split.name}"
        return f"{where}: {len(self.dropped)} of {num_rows} rows are left out:{listed}" + (
            f"\n  - and {more} more; metrics.jsonl lists them all" if more > 0 else ""
        )

    def microbatches(
        self,
        processor: ExampleProcessor,
        cache: Cache | None,
        *,
        num_ranks: int,
        packing: bool = False,
        may_drop: bool = False,
        emphasis: Emphasis | None = None,
        scores_own: bool = False,
    ) -> MicrobatchSource:
        """What makes the microbatches of these examples; all ranks' have pictures, or none has."""
        return MicrobatchSource(
            self.split,
            self.rows,
            processor,
            cache,
            needs_picture=num_ranks > 1 and self.has_pictures,
            packing=packing,
            may_drop=may_drop,
            emphasis=emphasis,
            scores_own=scores_own,
        )

    def spread(self, number: int | None) -> Survey:
        """So many of the examples, spread evenly: the first ones of a set may be of one kind, or one case."""
        if number is None or number >= self.num_examples:
            return self
        return self._of(np.arange(number) * self.num_examples // number)

    def without(self, rows: Collection[int]) -> Survey:
        """What is left when these rows are not asked either."""
        return self._of(np.flatnonzero(~np.isin(self.rows, list(rows)))) if rows else self

    def _of(self, places: np.ndarray) -> Survey:
        parts = {name: getattr(self, name)[places] for name in ("rows", "lengths", "pixels")}
        return replace(self, **parts)

    def work(self, tokens_per_pixel: float, *, packed: bool) -> Work:
        """What the examples ask of the ranks; a pixel costs the tower as much as that many tokens."""
        return Work.of(self.lengths, np.rint(self.pixels * tokens_per_pixel), packed=packed)


def survey(
    data: DataConfig,
    name: Split,
    processor: ExampleProcessor,
    cache: Cache | None,
    surveyors: Surveyors | None = None,
    *,
    show: bool = False,
) -> Survey:
    """Called by all ranks, which share the reading; ``surveyors`` None: by this process alone, and nothing is kept.

    Raises   DataError           when more rows are unusable than ``data.max_dropped`` allows
             CacheMismatchError  when the cache lacks usable rows
    """
    # Without a cache nobody has looked at the pictures yet; where all must be usable, a bad one waits for its step.
    decode = cache is None and data.max_dropped > 0
    keyed = survey_keys(data, name, processor, surveyors, show=show, decode=decode)
    usable, reasons = _left_out(keyed, cache)
    dropped = [reason for _, reason in keyed.unreadable] + reasons
    _check_number(keyed.split, data, num_usable=int(usable.sum()), dropped=dropped)
    if cache is not None:
        keys, rows = keyed.keys[usable], keyed.rows[usable]
        require_in_the_cache(
            cache, keys, processor, data, name_of=lambda place: keyed.split.where(int(rows[place]))
        )
    return Survey(
        split=keyed.split,
        rows=keyed.rows[usable],
        lengths=keyed.lengths[usable],
        pixels=keyed.pixels[usable],
        fingerprint=keys_fingerprint(keyed.keys[usable]),
        dropped=tuple(dropped),
        has_pictures=keyed.has_pictures,
        keys=keyed.keys[usable],
        written_by=keyed.written_by,
        own=keyed.own[usable],
        own_writers=keyed.own_writers,
    )


def survey_once(
    recipe: Recipe, name: Split, processor: ExampleProcessor, cache: Cache | None, world: World
) -> Survey:
    """As ``survey``, by all ranks of a run, which find what earlier runs and the capture have kept."""
    return survey(recipe.data, name, processor, cache, Surveyors.of_run(recipe, world), show=True)


def _left_out(keyed: Keyed, cache: Cache | None) -> tuple[np.ndarray, list[str]]:
    """Which rows the cache has not left out, (n,) bool, and the reasons of those that it has."""
    if cache is None:
        return np.ones(len(keyed.keys), bool), []
    skipped = are_skipped(keyed.keys, cache)
    places = np.flatnonzero(skipped).tolist()
    reasons = cache.skipped if places else {}
    return ~skipped, [
        f"{keyed.split.where(int(keyed.rows[i]))}: not in the cache: {reasons[keyed.keys[i].tobytes().hex()]}"
        for i in places
    ]


def _check_number(split: VqaSplit, data: DataConfig, *, num_usable: int, dropped: list[str]) -> None:
    if len(dropped) > data.max_dropped:
        raise DataError(
            f"{split.source}, split {split.name}: {len(dropped)} row(s) cannot be used, data.max_dropped "
            f"allows {data.max_dropped}:\n{listed(dropped)}"
        )
    if not num_usable:
        raise DataError(f"{split.source}, split {split.name}: no row can be used")
