"""How much of a student's labels a cache of another tokenizer covers, found out from some rows before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.cache import Cache
from shared.data.rows import VqaSplit
from shared.other_vocabulary import Coverage, StudentOfAnother, regrouped

NUM_LOOKED_AT = 256  # examples of a split, spread evenly


@dataclass(frozen=True)
class Covered:
    """num_unlike  answers whose text the two tokenizers do not write alike: labels alone are learned of them"""

    coverage: Coverage
    num_examples: int
    num_unlike: int

    def text(self) -> str:
        unlike = (
            f"; {self.num_unlike} answer(s) are written otherwise: labels alone" if self.num_unlike else ""
        )
        return f"{self.coverage.text()} ({self.num_examples} examples looked at){unlike}"


def look_at_coverage(
    split: VqaSplit, rows: Sequence[int], processor: StudentOfAnother, cache: Cache
) -> Covered:
    """Of some of these rows, as far as the cache has them.

    Raises   DataError, CacheFormatError  as reading them does
    """
    chosen = [rows[place * len(rows) // NUM_LOOKED_AT] for place in range(NUM_LOOKED_AT)] if rows else []
    coverage, num_examples, num_unlike = Coverage(), 0, 0
    for row in dict.fromkeys(chosen):
        example = split[row]
        key = processor.key(example)
        if key not in cache:
            continue
        alignment = processor.aligned(example).alignment
        targets = cache.targets(cache.rows([key], names=[split.where(row)]))  # type: ignore[arg-type]  # its own
        coverage += regrouped(targets, alignment, processor.vocabulary)[1]
        num_examples += 1
        num_unlike += alignment.num_unlike
    return Covered(coverage, num_examples, num_unlike)
