"""The teacher's entropy at each position, from what a cache keeps: entries, and the entropy of each row.

A row's sum is exact.  What the entries leave open of it is shared out in proportion to the mass that is not kept.  So
the sum of a row is exact, and so is every position whose distribution was kept whole.

N positions of R rows, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.recipes.policies import Random, Threshold
from shared.sparse.targets import SparseTargets, tempered_logprobs

Floats = npt.NDArray[np.float64]
SMALL = 1e-6  # mass below which a row counts as kept whole


def position_entropies(targets: SparseTargets, sums_RT: Floats, lengths: Sequence[int]) -> Tensor:
    """(N, T) fp32 nats at each captured temperature, whose sums over rows are ``sums_RT``.

    lengths  positions of each row; targets on the CPU
    """
    row_N = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    columns = [
        entropies(targets, sums_R, row_N, temperature=temperature)
        for temperature, sums_R in zip(targets.temperatures, sums_RT.T, strict=True)
    ]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def entropies(
    targets: SparseTargets, sums_R: Floats, row_N: npt.NDArray[np.int64], *, temperature: float
) -> Floats:
    """(N,) nats, whose sums over rows are ``sums_R``."""
    log_E = targets.logprobs.double()
    if is_share(targets):
        mass_E = targets.weights(temperature, torch.float64).numpy()
    else:
        normalizers_E = targets.log_normalizers.double()[targets.position_index]
        log_E = tempered_logprobs(log_E, normalizers_E, targets.temperatures)[
            targets.temperatures.index(temperature)
        ]
        mass_E = log_E.exp().numpy()  # not the weight: its mean alone is the probability, which is known

    def per_position(values_E: Floats) -> Floats:
        return np.bincount(targets.position_index.numpy(), values_E, targets.num_positions).astype(np.float64)

    left_N = np.clip(1 - per_position(mass_E * is_exact(targets)), 0, None)
    return shared_out(per_position(-mass_E * log_E.numpy()), left_N, sums_R, row_N)


def is_share(targets: SparseTargets) -> bool:
    """Whether the entries' log-probs are logs of shares of the draws, at the only temperature that was captured."""
    return isinstance(targets.policy, Random) and len(targets.temperatures) == 1


def is_exact(targets: SparseTargets) -> npt.NDArray[np.bool_]:
    """(E,): whether an entry's log-prob is the token's own; a drawn one of ``threshold`` may stand for any token."""
    if isinstance(targets.policy, Threshold) and targets.temperatures == (1.0,):
        drawn = torch.tensor(targets.policy.log_tau).half()
        return (targets.logprobs > drawn).numpy()
    return np.ones(targets.num_entries, dtype=bool)


def shared_out(known_N: Floats, open_N: Floats, sums_R: Floats, row_N: npt.NDArray[np.int64]) -> Floats:
    """Values whose sums over rows are ``sums_R``: what is known, and the rest in proportion to what is open.

    Where a row has nothing open, or more is known than there is, as draws and rounding may have it, all its
    values are scaled.  Where nothing is known either, as draws of one token each have it, they are all the same.
    """
    num_rows = len(sums_R)
    known_R = np.bincount(row_N, known_N, num_rows)
    says_nothing_R = (known_R <= 0) & (np.bincount(row_N, open_N, num_rows) <= SMALL)
    open_N = np.where(says_nothing_R[row_N], 1.0, open_N)
    open_R = np.bincount(row_N, open_N, num_rows)
    rest_R = sums_R - known_R
    is_shared_R = (open_R > SMALL) & (rest_R >= 0)
    each_R = np.where(is_shared_R, rest_R / np.maximum(open_R, SMALL), 0.0)
    scale_R = np.where(is_shared_R | (known_R <= 0), 1.0, sums_R / np.maximum(known_R, 1e-300))
    return known_N * scale_R[row_N] + each_R[row_N] * open_N
