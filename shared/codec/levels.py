"""Levels: the small whole numbers that stand for entries' weights in a payload.

threshold, top_k, top_p   the log-prob's place in the policy's grid, the lowest being 0
random                    how often the entry was drawn, less one
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from shared.recipes.policies import Policy, Random
from shared.sparse.grid import logprob_grid

Levels = npt.NDArray[np.int64]


def max_level(policy: Policy, temperatures: tuple[float, ...]) -> int:
    """The highest level that this policy may have."""
    if isinstance(policy, Random):
        return policy.draws - 1
    return len(logprob_grid(policy, temperatures)) - 1


def levels_of_logprobs(
    logprobs: npt.NDArray[np.float16], policy: Policy, temperatures: tuple[float, ...]
) -> Levels:
    levels = _level_of_bits(policy, temperatures)[logprobs.view(np.uint16)]
    assert levels.min(initial=0) >= 0, "log-probs that sparsify does not make for this policy"
    return levels


def logprobs_of_levels(
    levels: Levels, policy: Policy, temperatures: tuple[float, ...]
) -> npt.NDArray[np.float16]:
    return logprob_grid(policy, temperatures)[levels]


@functools.lru_cache(maxsize=16)
def _level_of_bits(policy: Policy, temperatures: tuple[float, ...]) -> Levels:
    """The level of each of the 65,536 bit patterns of fp16; -1 where the grid has no such number."""
    grid = logprob_grid(policy, temperatures)
    table = np.full(1 << 16, -1)
    # Of equal neighbours, which very small taus have, the first one counts.
    table[grid.view(np.uint16)[::-1]] = np.arange(len(grid))[::-1]
    return table
