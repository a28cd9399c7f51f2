"""Where a student is off: KL or CE by place in the answer and by kind of question, at the last validation.

page += [figure(drawing) for drawing in group_drawings(runs)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.reports.figures import Drawing, Series
from shared.reports.text import label
from stage2_student.evaluation.run_records import RunRecord, labels

ENOUGH = 10  # positions of a group, from which on their mean is drawn
MAX_KINDS = 12
KL, CE = "KL from the teacher", "Cross-entropy with the labels"


@dataclass(frozen=True)
class _Line:
    """One run's means, by the name of the group."""

    name: str
    series: Series
    means: dict[Any, float]
    positions: dict[Any, int]


def group_drawings(runs: Sequence[RunRecord]) -> list[Drawing]:
    """KL, or CE where no run has any, by place and by kind; empty for logs that do not tell."""
    drawings = []
    for group, title, draw in (
        ("by_place", "by position in the answer", _draw_places),
        ("by_kind", "by kind of question", _draw_kinds),
    ):
        for field, measure in (("kl", KL), ("ce", CE)):
            if lines := _lines(runs, group, field):
                told = "; ".join(f"{line.name}: {_told(line)}" for line in lines)
                caption = (
                    "Means over the positions of the validation split, at the last validation. Groups of fewer than "
                    f"{ENOUGH} positions are left out."
                )
                drawings.append(Drawing(f"{measure}, {title}", partial(draw, lines=lines), caption, told))
                break
    return drawings


def _lines(runs: Sequence[RunRecord], group: str, field: str) -> list[_Line]:
    lines = []
    for number, (name, run) in enumerate(zip(labels(runs), runs, strict=True)):
        found: Any = run.last_validation.get(group)
        try:
            rows = list(zip(found["names"], found[field], found["positions"], strict=True))
            means = {one: float(mean) for one, mean, count in rows if count >= ENOUGH}
            counts = {one: int(count) for one, _, count in rows}
        except (KeyError, TypeError, ValueError):  # a log of before, damaged, or without a cache
            continue
        if means:
            lines.append(_Line(name, Series(number), means, counts))
    return lines


def _told(line: _Line) -> str:
    names = list(line.means)
    worst = max(names, key=line.means.__getitem__)
    return f"largest at {worst}, {line.means[worst]:.3f} nats"


def _draw_places(axes: Any, *, lines: Sequence[_Line]) -> None:
    for line in lines:
        axes.plot(list(line.means), list(line.means.values()), **line.series.points())
    axes.set(xlabel="token of the answer", ylabel="nats per position")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_kinds(axes: Any, *, lines: Sequence[_Line]) -> None:
    counts: dict[str, int] = {}
    for line in lines:
        counts |= {kind: line.positions[kind] for kind in line.means}
    kinds = sorted(counts, key=lambda kind: -counts[kind])[:MAX_KINDS]
    for line in lines:
        rows = [row for row, kind in enumerate(kinds) if kind in line.means]
        style = line.series.points() | {"linestyle": "none"}
        axes.plot([line.means[kinds[row]] for row in rows], rows, **style)
    axes.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max(value for line in lines for value in line.means.values()))
    axes.set(xlabel="nats per position")
