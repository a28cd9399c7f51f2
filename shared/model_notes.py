"""What a model's files come to, and which examples are too long for it: told as a capture or a run starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from transformers import PretrainedConfig

from shared.data.rows import VqaSplit
from shared.models.quantized import what_becomes_of_it
from shared.models.vlm import context_of, scale_left_out


class Measured(Protocol):
    """Examples of a split: (n,) int64 their rows, and about so many tokens of each."""

    @property
    def split(self) -> VqaSplit: ...
    @property
    def rows(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...


def notes_on_files(
    config: PretrainedConfig, parts: Iterable[Measured], *, whose: str, dequantize: bool
) -> Iterator[str]:
    """One for each.

    whose       the model, as the user knows it
    dequantize  quantised weights become ordinary ones
    """
    for told in (what_becomes_of_it(config, dequantize=dequantize), scale_left_out(config)):
        if told is not None:
            yield f"{whose}: {told}"
    context = context_of(config)
    for part in parts:
        num_too_long = int((part.lengths > (context or np.inf)).sum())
        if num_too_long:
            worst = int(part.lengths.argmax())
            yield (
                f"{part.split.source}, split {part.split.name}: about {num_too_long:,} of {len(part.rows):,} rows "
                f"have more tokens than the context of {whose}, {context:,}; row {part.rows[worst]} has about "
                f"{int(part.lengths[worst]):,}. It was not made for them. Lower data.max_pixels or "
                "data.max_answer_tokens, or take these rows out"
            )
