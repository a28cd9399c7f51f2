"""Which answers need their pictures, as a cache with ``cache.visual_gain`` tells it.

An answer's gain is the sum over its tokens: the log of how many times likelier the teacher finds the whole answer
with the pictures.  It *needs* them where that is at least twice.

R rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache import Row
from shared.recipes.policies import VisualGain
from shared.reports.figures import COLORS, Drawing, add_legend
from shared.reports.pieces import table

NEEDED = math.log(2)
NUM_BINS = 40
EXTREMES = (0.5, 99.5)  # per cent; what lies beyond is drawn in the first and last bar


def gains_of_answers(rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """(R,) nats, a sum over each answer; of rows that have gains."""
    gains = [row.label_gain for row in rows if row.label_gain is not None]
    return np.array([one.sum(dtype=np.float64) for one in gains])


def need(gains_R: npt.NDArray[np.float64]) -> str:
    """The share of answers that need their pictures, like ``41 %``."""
    return f"{np.mean(gains_R >= NEEDED):.0%}".replace("%", " %")


def told(gains_R: npt.NDArray[np.float64], how: VisualGain) -> str:
    """A paragraph of what the numbers mean, with the share of all."""
    return (
        f"The teacher saw each answer a second time with its pictures {how}. An answer needs its pictures where they "
        f"make it at least twice as likely: {need(gains_R)} of {len(gains_R):,} answers do. A gain below 0 means "
        "that the pictures mislead."
    )


def gain_drawing(rows: Sequence[Row]) -> Drawing:
    gains_R = gains_of_answers(rows)
    low, high = np.percentile(gains_R, EXTREMES)
    edges = np.linspace(min(low, 0.0) - 1e-3, max(high, NEEDED) + 1e-3, NUM_BINS + 1)
    shown_R = gains_R.clip(edges[0], edges[-1])
    alternative = (
        f"{need(gains_R)} of {len(gains_R)} answers need their pictures; median {np.median(gains_R):.2f} nats"
    )

    def draw(axes: Any) -> None:
        axes.hist(shown_R, bins=edges, color=COLORS[0], weights=np.full(len(shown_R), 100 / len(shown_R)))
        axes.axvline(NEEDED, color=COLORS[1], linestyle="--", label="twice as likely with the pictures")
        axes.set(xlabel="gain of an answer (nats)", ylabel=f"% of {len(gains_R):,} answers")
        add_legend(axes)

    caption = (
        "How much likelier the teacher finds an answer with its pictures, on a logarithmic axis: 0 is equally "
        "likely. The few answers beyond the axis are in its first and last bar."
    )
    return Drawing("What the pictures give", draw, caption, alternative)


def by_kind_table(kinds: Sequence[str], rows: Sequence[Row]) -> str:
    """kinds  (R,) of the rows"""
    gains_R, lengths_R = gains_of_answers(rows), np.array([row.num_positions for row in rows])
    kind_R = np.array(kinds, dtype=object)
    lines = []
    for kind, number in Counter(kinds).most_common():
        of_kind = kind_R == kind
        mean = gains_R[of_kind].sum() / lengths_R[of_kind].sum()
        median = float(np.median(gains_R[of_kind]))
        lines.append([kind, str(number), need(gains_R[of_kind]), f"{median:.2f}", f"{mean:.3f}"])
    head = [
        "kind",
        "answers",
        "need their pictures",
        "median gain (nats per answer)",
        "mean gain (nats per position)",
    ]
    return table(head, lines, caption=f"{len(rows)} random examples")
