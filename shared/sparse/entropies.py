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

from shared.recipes.policies import Threshold
from shared.sparse.mixture import MixedTargets
from shared.sparse.targets import SparseTargets, tempered_logprobs

Floats = npt.NDArray[np.float64]
SMALL = 1e-6  # mass below which a row counts as kept whole


def teacher_entropy(
    targets: SparseTargets | MixedTargets, lengths: Sequence[int], *, temperature: float
) -> Tensor:
    """(N,) fp32 nats, at a captured temperature; of a mix the mean of its teachers' by their shares.

    lengths  positions of each row; targets as a cache gives them, on the CPU
    """
    if isinstance(targets, MixedTargets):
        parts = [teacher_entropy(part, lengths, temperature=temperature) for part in targets.parts]
        return torch.stack([part * share for part, share in zip(parts, targets.shares, strict=True)]).sum(0)
    row_N = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    column = targets.temperatures.index(temperature)
    sums_R = np.bincount(row_N, targets.entropy[:, column].double().numpy(), len(lengths)).astype(np.float64)
    return torch.from_numpy(entropies(targets, sums_R, row_N, temperature=temperature).astype(np.float32))


def entropies(
    targets: SparseTargets, sums_R: Floats, row_N: npt.NDArray[np.int64], *, temperature: float
) -> Floats:
    """(N,) nats, whose sums over rows are ``sums_R``."""
    log_E = tempered_logprobs(
        targets.logprobs.double(),
        targets.log_normalizers.double()[targets.position_index],
        targets.temperatures,
    )[targets.temperatures.index(temperature)]
    weights_E = targets.weights(temperature).double().numpy()

    def per_position(values_E: Floats) -> Floats:
        return np.bincount(targets.position_index.numpy(), values_E, targets.num_positions).astype(np.float64)

    left_N = np.clip(1 - per_position(weights_E * is_exact(targets)), 0, None)
    return shared_out(per_position(-weights_E * log_E.numpy()), left_N, sums_R, row_N)


def is_exact(targets: SparseTargets) -> npt.NDArray[np.bool_]:
    """(E,): whether an entry's log-prob is the token's own; a drawn one of ``threshold`` may stand for any token."""
    if isinstance(targets.policy, Threshold) and targets.temperatures == (1.0,):
        drawn = torch.tensor(targets.policy.log_tau).half()
        return (targets.logprobs > drawn).numpy()
    return np.ones(targets.num_entries, dtype=bool)


def shared_out(known_N: Floats, open_N: Floats, sums_R: Floats, row_N: npt.NDArray[np.int64]) -> Floats:
    """Values whose sums over rows are ``sums_R``: what is known, and the rest in proportion to what is open.

    Where a row has nothing open, or more is known than there is, as draws and rounding may have it, all its
    values are scaled.
    """
    num_rows = len(sums_R)
    known_R = np.bincount(row_N, known_N, num_rows)
    open_R = np.bincount(row_N, open_N, num_rows)
    rest_R = sums_R - known_R
    is_shared_R = (open_R > SMALL) & (rest_R >= 0)
    each_R = np.where(is_shared_R, rest_R / np.maximum(open_R, SMALL), 0.0)
    scale_R = np.where(is_shared_R | (known_R <= 0), 1.0, sums_R / np.maximum(known_R, 1e-300))
    return known_N * scale_R[row_N] + each_R[row_N] * open_N
