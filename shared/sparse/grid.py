"""The log-probs that an entry may have: all of fp16, or fewer, where fewer cost no measurable error.

Shapes: G values of a grid, E entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.recipes.policies import Policy, Threshold

_STEPS_PER_ROOT = (
    16  # of sqrt(p) / sqrt(tau); the noise of rounding is then 3 % of the draws' (docs/targets.md)
)
_LOWEST = -65504.0


def has_floor(policy: Policy, temperatures: tuple[float, ...]) -> bool:
    """Whether drawn entries all have the log-prob ``policy.log_tau``, that of their weight."""
    return isinstance(policy, Threshold) and temperatures == (1.0,)


@functools.lru_cache(maxsize=16)
def logprob_grid(policy: Policy, temperatures: tuple[float, ...]) -> npt.NDArray[np.float16]:
    """The log-probs (G,) fp16, rising to 0, that entries of this policy may have.

    ``values: levels`` are even steps of sqrt(p) from sqrt(tau) to 1, about sqrt(tau) / 16 each: rounding to
    them adds noise in proportion to p, as drawing does.
    """
    if not has_floor(policy, temperatures):
        return _all_fp16(_LOWEST)
    assert isinstance(policy, Threshold)
    if policy.values == "fp16":
        return _all_fp16(policy.log_tau)
    root = math.exp(policy.log_tau / 2)
    num_steps = math.ceil(_STEPS_PER_ROOT * (1 / root - 1))
    if num_steps == 0:
        return np.zeros(1, np.float16)
    roots = root + (1 - root) * np.arange(num_steps + 1) / num_steps
    grid = (2 * np.log(roots)).astype(np.float16)
    grid[0], grid[-1] = policy.log_tau, 0.0
    return grid


@functools.lru_cache(maxsize=16)
def grid_on(policy: Policy, temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """``logprob_grid`` (G,) fp16 on a device, copied there once: the host waits for each copy."""
    return torch.from_numpy(logprob_grid(policy, temperatures)).to(device)


def _all_fp16(lowest: float) -> npt.NDArray[np.float16]:
    """All fp16 numbers from ``lowest`` to 0: below zero, falling bit patterns are rising numbers."""
    first = int(np.float16(lowest).view(np.uint16))
    rising = np.arange(first, 0x8000, -1) if first else np.zeros(0)
    return np.append(rising, 0).astype(np.uint16).view(np.float16)


def round_unbiased(logprobs: Tensor, chance: Tensor, grid: Tensor, *, share: Share | None = None) -> Tensor:
    """One of the two neighbours in the grid, such that the mean *probability* is exact, or what ``share`` wants.

    Shapes   logprobs (E,) fp32, none below the grid's first; chance (E,), uniform in [0, 1); grid (G,) fp16
             share of logprobs and both neighbours (E,) fp32: how often the upper one is to be taken
    Returns  (E,) fp16
    """
    exact = grid.float()
    low = (torch.searchsorted(exact, logprobs, right=True) - 1).clamp_min_(0)
    high = (low + 1).clamp_max_(len(grid) - 1)
    upper = (share or share_of_mass(1.0))(logprobs, exact[low], exact[high])
    return torch.where(chance < upper, grid[high], grid[low])  # NaN at the grid's end, where both are one


Share = Callable[[Tensor, Tensor, Tensor], Tensor]


def share_of_mass(temperature: float) -> Share:
    """What makes the mean of p ** (1 / temperature) exact."""
    return lambda x, low, high: torch.expm1((x - low) / temperature) / torch.expm1((high - low) / temperature)


def share_of_mean(function: Callable[[Tensor], Tensor]) -> Share:
    """What makes the mean of a function of the log-prob exact, if it rises or falls between neighbours."""
    return lambda x, low, high: (function(x) - function(low)) / (function(high) - function(low))
