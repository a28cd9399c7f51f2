"""What ``encode`` can have made: bounds on a payload before it is decoded, and on what came out of it.

A hash proves that bytes are those that were written, not who wrote them.  Compressed symbols can stand for
two thousand times as many, so a row may have no more than its positions and its policy allow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.codec.entries import InconsistentError
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.sparse import SparseTargets

_FP16_SLACK = 0.02  # of the sum of a position's masses, whose logs are fp16
_LEVELS_SLACK = 1 / 8  # rounding to levels moves a mass by at most sqrt(p * tau) / 8
_SUM_SLACK = 2e-3  # teachers' probabilities sum to one within half of this


def max_entries(policy: Policy, temperatures: tuple[float, ...], vocab_size: int) -> int:
    """The most entries that a position may have."""
    if isinstance(policy, Random):
        return min(policy.draws, vocab_size)
    if isinstance(policy, Threshold):
        # Each certain token and each step has a mass of tau at least; at several temperatures a token is
        # chosen by the most that rounding to fp16 can make of its mass.
        mass = 1.01
        if temperatures != (1.0,):
            mass = 1.1 * sum(math.exp(min(2.0**-6 / t, 50.0)) for t in temperatures)
        return min(vocab_size, math.ceil(mass / math.exp(policy.log_tau)) + 1)
    return min(policy.k if isinstance(policy, TopK) else policy.max_k, vocab_size)


def require_possible(targets: SparseTargets, vocab_size: int) -> None:
    """Raises InconsistentError for targets that no teacher and this policy give."""
    policy, temperatures, counts = targets.policy, targets.temperatures, targets.counts.numpy()
    most, fewest = max_entries(policy, temperatures, vocab_size), 0 if isinstance(policy, Threshold) else 1
    if counts.max(initial=0) > most or counts.min(initial=fewest) < fewest:
        wrong = counts[(counts > most) | (counts < fewest)][0]
        raise InconsistentError(f"a position has {wrong} entries; {fewest} to {most} are possible")
    if isinstance(policy, Random):
        sums = _sums(targets.draw_counts.numpy().astype(np.int64), counts)
        if (sums != policy.draws).any():
            raise InconsistentError(f"a position's draws are not the policy's {policy.draws}")
    if not isinstance(policy, Random) or len(temperatures) > 1:
        most_mass = 1 + _FP16_SLACK
        if isinstance(policy, Threshold) and temperatures == (1.0,):
            most_mass += policy.tau + _LEVELS_SLACK
        if _sums(np.exp(targets.logprobs.numpy().astype(np.float32)), counts).max(initial=0) > most_mass:
            raise InconsistentError(f"a position's masses sum to more than {most_mass:.3f}")
    _require_normalizers(targets.log_normalizers.numpy(), temperatures, vocab_size)


def _require_normalizers(
    normalizers: npt.NDArray[np.float32], temperatures: tuple[float, ...], vocab_size: int
) -> None:
    """log sum_v p(v) ** (1 / T) lies between that of a certain teacher, 0, and of a flat one, (1 - 1 / T) log V."""
    for column, temperature in zip(normalizers.T, [t for t in temperatures if t != 1.0], strict=True):
        flat = (1 - 1 / temperature) * math.log(vocab_size)
        slack = _SUM_SLACK * max(1.0, 1 / temperature) + 1e-4 * abs(flat)
        low, high = min(0.0, flat) - slack, max(0.0, flat) + slack
        if not ((column >= low) & (column <= high)).all():
            raise InconsistentError(
                f"a log-normaliser at temperature {temperature:g} is not in {low:.3f} ... {high:.3f}"
            )


def _sums(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Over each position that has entries."""
    starts = (np.cumsum(counts) - counts)[counts > 0]
    return np.add.reduceat(values, starts) if len(starts) else values[:0]
