"""How far apart two targets are for a student: by the gradient of its head, over batches of several sizes.

Legend: n positions of a block, V vocabulary, C projected hidden dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BLOCK = 64  # positions at a time, and the smallest batch whose gradient is looked at
BATCHES = (64, 512, 4096)  # positions


@dataclass(frozen=True)
class Measured:
    """A mean over positions, and the same of the teacher against itself; None where it is not defined."""

    cache: float | None
    floor: float | None


class HeadGradients:
    """Gradients of the head, summed over batches of 64, 512 and 4,096 positions, and how they differ."""

    def __init__(self, num_positions: int) -> None:
        whole = min(num_positions, BLOCK)
        self.sizes = [size for size in BATCHES if size <= num_positions] or [whole]
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self.seen = 0

    def add(self, features_nC: Tensor, live_nV: Tensor, others: dict[str, Tensor], student_V: Tensor) -> None:
        """``others`` are what the trainer would make of other targets, (n, V)."""
        self.seen += len(features_nC)
        own = {name: taught_nV.T @ features_nC for name, taught_nV in others.items()}
        own["live"] = (live_nV - student_V).T @ features_nC
        for size in self.sizes:
            held = self.sums.setdefault(size, {})
            for name, value in own.items():
                held[name] = held[name] + value if name in held else value
            if self.seen % size == 0:
                self._close(size)

    def _close(self, size: int) -> None:
        live = self.sums[size]["live"].double()
        for name in ("cache", "floor"):
            other = self.sums[size][name].double()
            error = (other - live).norm() / live.norm().clamp_min(1e-30)
            cosine = (other * live).sum() / (other.norm() * live.norm()).clamp_min(1e-30)
            self.found.setdefault((size, name), []).append((error.item(), cosine.item()))
        self.sums.pop(size)

    def errors(self) -> dict[int, Measured]:
        return self._means(0)

    def cosines(self) -> dict[int, Measured]:
        return self._means(1)

    def _means(self, column: int) -> dict[int, Measured]:
        def mean(size: int, name: str) -> float:
            values = [pair[column] for pair in self.found[size, name]]
            return sum(values) / len(values)

        return {size: Measured(mean(size, "cache"), mean(size, "floor")) for size in self.sizes}
