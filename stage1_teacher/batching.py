"""Batches of like length under a budget of tokens, which an out-of-memory error makes smaller for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.errors import TrainingError

Result = TypeVar("Result")


def batches_of_like_length(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices in batches whose padded size, longest times number, is at most ``max_tokens``.

    Shortest first; equal lengths keep their order; a sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass
class BatchRunner:
    """Runs batches; one that does not fit into memory is halved, and its size is never tried again.

    max_tokens  the budget, which only shrinks
    """

    max_tokens: int

    def run(
        self, lengths: Sequence[int], forward: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Yields each batch's indices with what ``forward`` made of them.

        Raises   TrainingError  when a single sequence does not fit.
        """
        pending = batches_of_like_length(lengths, max_tokens=self.max_tokens)[::-1]
        while pending:
            batch = pending.pop()
            try:
                result = forward(batch)
            except torch.OutOfMemoryError as error:
                result = None
                longest = max(lengths[index] for index in batch)
                if len(batch) == 1:
                    raise TrainingError(
                        f"one sequence of {longest} tokens does not fit into the device's memory. Make pictures "
                        "smaller (data.max_pixels), shorten answers (data.max_answer_tokens), lower "
                        "cache.chunk_size, or shard the teacher (teacher.shard)"
                    ) from error
            if result is None:
                torch.cuda.empty_cache()
                self.max_tokens = min(self.max_tokens, longest * (len(batch) // 2))
                rest = [index for later in [batch, *pending[::-1]] for index in later]
                again = batches_of_like_length([lengths[i] for i in rest], max_tokens=self.max_tokens)
                pending = [[rest[i] for i in some] for some in again][::-1]
                continue
            yield batch, result
