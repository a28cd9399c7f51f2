"""Calibration: how often the likeliest token is the label, against the probability it was given.

    found = Reliability.of(top_probs_N, is_label_N) + more
    found.error                                               # expected calibration error, 0 to 1

Positions are counted in ten bins of probability, as sums, so that parts of a split add up to the whole.

Source   Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.reports.figures import REFERENCE, Drawing, Series, add_legend
from shared.reports.text import label

NUM_BINS = 10
ENOUGH = 20  # positions of a bin, from which on its point is drawn


@dataclass(frozen=True)
class Reliability:
    """Sums over positions, by tenths of the likeliest token's probability.

    count       positions
    confidence  sum of that probability
    right       positions at which that token is the label
    """

    count: tuple[float, ...]
    confidence: tuple[float, ...]
    right: tuple[float, ...]

    @classmethod
    def of(cls, top_probs_N: npt.ArrayLike, is_label_N: npt.ArrayLike) -> Reliability:
        probs_N = np.asarray(top_probs_N, dtype=float)
        bins_N = np.clip((probs_N * NUM_BINS).astype(int), 0, NUM_BINS - 1)
        weights = (np.ones(len(probs_N)), probs_N, np.asarray(is_label_N, dtype=float))
        return cls(*(tuple(np.bincount(bins_N, values, NUM_BINS).tolist()) for values in weights))

    @classmethod
    def read(cls, value: Any) -> Reliability | None:
        """What ``to_json`` made; None where it is not that, as in a log of before."""
        if not isinstance(value, Mapping) or set(value) != {"count", "confidence", "right"}:
            return None
        try:
            columns = {name: tuple(map(float, value[name])) for name in value}
        except (TypeError, ValueError):
            return None
        return cls(**columns) if all(len(column) == NUM_BINS for column in columns.values()) else None

    def to_json(self) -> dict[str, list[float]]:
        return {name: list(column) for name, column in asdict(self).items()}

    def __add__(self, other: Reliability) -> Reliability:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Reliability(*(tuple(a + b for a, b in zip(*columns, strict=True)) for columns in pairs))

    @property
    def num_positions(self) -> int:
        return round(sum(self.count))

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of probability and share of labels, over positions."""
        gaps = (abs(c - r) for c, r in zip(self.confidence, self.right, strict=True))
        return sum(gaps) / max(1.0, sum(self.count))

    def points(self) -> list[tuple[float, float]]:
        """(mean probability, share of labels) of each bin with enough positions."""
        bins = zip(self.count, self.confidence, self.right, strict=True)
        return [(confidence / count, right / count) for count, confidence, right in bins if count >= ENOUGH]


def draw_reliability(found: Mapping[str, tuple[Reliability, Series | None]]) -> Drawing:
    """One line a model; one without a series of its own is the reference, as a teacher is."""
    told = "; ".join(
        f"{name}: calibration error {one.error:.1%} over {one.num_positions:,} positions"
        for name, (one, _) in found.items()
    )
    return Drawing(
        "Calibration",
        partial(_draw, found=found),
        "How often the likeliest next token is the label, against the probability it was given. On the diagonal a "
        "model is as right as it is sure; below it, it is too sure. ECE is the mean distance from the diagonal. "
        f"Bins with fewer than {ENOUGH} positions are left out.",
        told,
    )


def _draw(axes: Any, *, found: Mapping[str, tuple[Reliability, Series | None]]) -> None:
    axes.plot([0, 1], [0, 1], color=REFERENCE, linewidth=0.8, linestyle=":")
    for name, (one, series) in found.items():
        style = {"color": REFERENCE, "marker": ".", "linestyle": "--", "linewidth": 1.4}
        style = style if series is None else series.points()
        named = f"{label(name)}, ECE {one.error:.1%}"
        points = one.points()
        axes.plot(
            [x for x, _ in points], [y for _, y in points], **style | {"label": named, "clip_on": False}
        )
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="probability of the likeliest token",
        ylabel="share of positions where it is the label",
    )
    add_legend(axes)
