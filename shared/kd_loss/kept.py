"""Which positions of an example are kept: the share of them with the highest scores.

The number depends on the example's length alone, and the choice on its own scores: not on its batch, rank or
microbatch.

N positions of some examples, one after the other; K of them kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 1e-9  # of a product such as 0.07 * 100, which is above 7


def num_kept(lengths: Sequence[int], keep: float) -> list[int]:
    """Of each example the number of positions: its share, rounded up."""
    return [math.ceil(keep * length - SLACK) for length in lengths]


def highest(scores_N: Tensor, lengths: Sequence[int], keep: float) -> Tensor:
    """The kept positions, (K,) int64, ascending; of equal scores the earlier position.

    Shapes   scores_N (N,), any float dtype; lengths sum to N
    """
    device = scores_N.device
    by_score_N = scores_N.argsort(descending=True, stable=True)
    lengths_R = torch.tensor(lengths, dtype=torch.int64)
    row_N = torch.repeat_interleave(torch.arange(len(lengths_R)), lengths_R).to(device, non_blocking=True)
    by_row_N = by_score_N[row_N[by_score_N].argsort(stable=True)]  # row after row, each from its highest on
    places, start = [], 0
    for length, number in zip(lengths, num_kept(lengths, keep), strict=True):
        places.append(torch.arange(start, start + number))
        start += length
    place_K = torch.cat([torch.zeros(0, dtype=torch.int64), *places]).to(device, non_blocking=True)
    return by_row_N[place_K].sort().values
