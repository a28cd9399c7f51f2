"""Batches of like length under a budget of tokens, which an out-of-memory error makes smaller for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.dealing import Limits, Work, deal
from shared.errors import TrainingError, is_out_of_memory

Result = TypeVar("Result")


def batches_of_like_length(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices in batches whose padded size, longest times number, is at most ``max_tokens``.

    Longest first; a sequence longer than the budget is a batch of its own.
    """
    rounds = deal(Work.of(lengths), num_ranks=1, limits=Limits(tokens=max_tokens))
    return [list(batch) for (batch,) in rounds]


@dataclass
class BatchRunner:
    """Runs batches; one that does not fit into memory is halved, and its size is never tried again.

    max_tokens  the budget, which only shrinks
    may_shrink  False where other ranks take part in each forward, so that none may be tried again
    setting     the recipe's key for the budget, named where it is too large
    remedy      what helps where a single sequence does not fit
    """

    max_tokens: int
    may_shrink: bool = True
    setting: str = "cache.batch_tokens"
    remedy: str = "shorten answers (data.max_answer_tokens), lower cache.chunk_size, or shard the teacher"

    def run(
        self, lengths: Sequence[int], forward: Callable[[list[int]], Result], *, names: Sequence[str] = ()
    ) -> Iterator[tuple[list[int], Result]]:
        """Yields each batch's indices with what ``forward`` made of them.

        names  of the sequences, for the error
        Raises   TrainingError  when a single sequence does not fit.
        """
        pending = batches_of_like_length(lengths, max_tokens=self.max_tokens)[::-1]
        while pending:
            batch = pending.pop()
            try:
                result = forward(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                pending = self._smaller(lengths, [batch, *pending[::-1]], error, names)
            else:
                yield batch, result
                continue
            torch.cuda.empty_cache()  # not above, where the error's traceback still holds the batch's tensors

    def _smaller(
        self, lengths: Sequence[int], batches: list[list[int]], error: Exception, names: Sequence[str]
    ) -> list[list[int]]:
        """The same examples in batches of at most half of the first one's size, in reverse order."""
        too_large = batches[0]
        longest = max(lengths[index] for index in too_large)
        if not self.may_shrink:
            raise TrainingError(
                f"a batch of {longest * len(too_large)} tokens does not fit into the device's memory, and a teacher "
                f"that ranks share cannot try a smaller one. Lower {self.setting}"
            ) from error
        if len(too_large) == 1:
            name = f"{names[too_large[0]]}: " if names else ""
            raise TrainingError(
                f"{name}one sequence of {longest} tokens does not fit into the device's memory. Make pictures "
                f"smaller (data.max_pixels), {self.remedy}"
            ) from error
        self.max_tokens = min(self.max_tokens, longest * (len(too_large) // 2))
        rest = [index for batch in batches for index in batch]
        again = batches_of_like_length([lengths[index] for index in rest], max_tokens=self.max_tokens)
        return [[rest[place] for place in batch] for batch in again][::-1]
