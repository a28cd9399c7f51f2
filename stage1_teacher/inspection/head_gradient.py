"""How far apart two targets are for a student: by the gradient of its head, over batches of several sizes.

    gradients = HeadGradients(num_positions)
    cache_nV = pull(targets, student_V, temperature=1.0, tail="ghost")
    gradients.add(features_nC, live_nV=live_nV - student_V, cache_nV=cache_nV, floor_nV=None)

Legend: n positions of a block, V vocabulary, C projected hidden dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kd_loss import FORWARD_KL
from shared.kd_loss.chunk import chunk_loss_
from shared.kd_loss.teacher import sparse_teacher
from shared.kd_loss.tile import LossSettings
from shared.sparse import SparseTargets

BLOCK = 64  # positions at a time
BATCHES = (64, 512, 4096)  # positions, multiples of a block


def pull(targets: SparseTargets, student_V: Tensor, *, temperature: float, tail: str) -> Tensor:
    """What the trainer's own loss pulls the student's logits by, over the temperature: the negative gradient.

    Added to the student it is the distribution that the loss takes the targets for, where that is one.

    Shapes   student_V (V,) fp64, a student that says the same everywhere, at this temperature
    Returns  (n, V) fp64, as what is left of a difference is looked at
    """
    num_ids = len(student_V)
    teacher = sparse_teacher(
        targets,
        temperature=temperature,
        divergence=FORWARD_KL,
        tail=tail,
        num_vocab_ids=num_ids,
        dtype=torch.float64,
    )
    logits_nV = student_V.clamp_min(1e-300).log().repeat(targets.num_positions, 1)
    labels_n = torch.zeros(targets.num_positions, dtype=torch.int64)  # of CE, which has no part in it
    # At temperature 1, as these logits have been divided by theirs.
    settings = LossSettings(kd_ratio=1.0, temperature=1.0, num_vocab_ids=num_ids)
    chunk_loss_(logits_nV, labels_n, None, teacher, 0, settings, with_grad=True)
    return logits_nV.neg_()


@dataclass(frozen=True)
class Measured:
    """A figure of the cache, and the same of the teacher against itself; None where it is not defined."""

    cache: float | None
    floor: float | None


@dataclass(frozen=True)
class _Sums:
    """Gradients (V, C) of the positions of one batch so far."""

    live: Tensor
    cache: Tensor
    floor: Tensor | None


class HeadGradients:
    """Gradients of the head, summed over batches of 64, 512 and 4,096 positions, and how they differ.

    Holds    a size that there are too few positions for has no figure; positions that fill no batch count in none
    """

    def __init__(self, num_positions: int) -> None:
        self._sizes = [size for size in BATCHES if size <= num_positions]
        self._sums: dict[int, _Sums] = {}
        self._of_cache: dict[int, list[tuple[float, float]]] = {}
        self._of_floor: dict[int, list[tuple[float, float]]] = {}
        self._seen = 0

    def add(self, features_nC: Tensor, *, live_nV: Tensor, cache_nV: Tensor, floor_nV: Tensor | None) -> None:
        """One block: what each target pulls the student's logits by, the negative gradient."""
        self._seen += len(features_nC)
        live, cache = live_nV.T @ features_nC, cache_nV.T @ features_nC
        floor = None if floor_nV is None else floor_nV.T @ features_nC
        for size in self._sizes:
            held = self._sums.get(size)
            if held is not None:
                sums = _Sums(held.live + live, held.cache + cache, _add(held.floor, floor))
            else:
                sums = _Sums(live, cache, floor)
            self._sums[size] = sums
            if self._seen % size == 0:
                self._close(size)

    def _close(self, size: int) -> None:
        sums = self._sums.pop(size)
        self._of_cache.setdefault(size, []).append(_difference(sums.cache, sums.live))
        if sums.floor is not None:
            self._of_floor.setdefault(size, []).append(_difference(sums.floor, sums.live))

    def errors(self) -> dict[int, Measured]:
        """Relative errors, means over batches of each size."""
        return self._means(0)

    def cosines(self) -> dict[int, Measured]:
        return self._means(1)

    def _means(self, column: int) -> dict[int, Measured]:
        def mean(pairs: list[tuple[float, float]]) -> float | None:
            return sum(pair[column] for pair in pairs) / len(pairs) if pairs else None

        return {
            size: Measured(mean(self._of_cache.get(size, [])), mean(self._of_floor.get(size, [])))
            for size in BATCHES
        }


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def _difference(other: Tensor, live: Tensor) -> tuple[float, float]:
    """Relative error and cosine."""
    other, live = other.double(), live.double()
    error = (other - live).norm() / live.norm().clamp_min(1e-30)
    cosine = (other * live).sum() / (other.norm() * live.norm()).clamp_min(1e-30)
    return error.item(), cosine.item()
