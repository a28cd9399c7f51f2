"""Runs as curves: losses and costs over steps, calibration, and a sweep's measures against its settings.

    plot(runs, Path("plots"))                                        # ce_loss.png, kl.png
    page += [figure(drawing) for drawing in loss_drawings(runs).values()]

A run has one colour, marker and dash in every figure; a page names them once, in its key.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared.reports.figures import (
    REFERENCE,
    Drawing,
    Series,
    add_legend,
    require_matplotlib,
    save_png,
    set_log,
    spans_much,
)
from shared.reports.reliability import Reliability, draw_reliability
from stage2_student.evaluation.run_records import RunRecord, labels, points, teacher_ce_of

SMOOTHED = 0.02  # of the steps: the width of the running mean over training losses
MAX_MARKERS = 12  # of a curve
UNIT = "nats per position"
LOSSES = {
    "ce_loss": "Cross-entropy with the labels",
    "kl": "KL from the teacher",
    "soft_ce": "Cross-entropy with a teacher of another tokenizer",
}
COSTS = {
    "learning_rate": ("Learning rate", "learning rate", 1.0, "As the schedule has it."),
    "grad_norm": ("Gradient norm", "norm, before clipping", 1.0, "Peaks are steps that clipping tamed."),
    "positions_per_s": ("Speed", "positions per second", 1.0, "Waits for data are part of it."),
    "data_wait": ("Waiting for data", "% of a step's time", 100.0, "Near zero, the devices are kept busy."),
    "shared_positions": ("Shared positions", "% of positions", 100.0, "Those with targets of the teacher."),
    "shared_mass": ("Shared mass", "% of the teacher's", 100.0, "Of shared positions: what has an id."),
}

Points = list[tuple[int, float]]


def plot(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes the losses' curves into ``folder``, one line a run; returns the pictures' paths.

    Raises   RecipeError  when matplotlib is not installed
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    return [
        save_png(drawing, folder / f"{name}.png") for name, drawing in loss_drawings(runs, named=True).items()
    ]


def loss_drawings(runs: Sequence[RunRecord], *, named: bool = False) -> dict[str, Drawing]:
    """Each loss over all steps and, where the start dwarfs the rest, over the second half again.

    named  with a legend, for a picture that stands alone
    """
    found = {}
    for field, title in LOSSES.items():
        every = [
            value
            for run in runs
            for event in ("step", "validation")
            for _, value in points(run, event, field)
        ]
        if not every:
            continue
        told = _told(runs, field)
        level = {"ce_loss": teacher_ce_of(runs)}.get(field)
        draw = partial(_draw_losses, runs=runs, field=field, level=level, named=named)
        caption = "Lines: training, smoothed. Open marks: validation." + (
            " Dashed: the teacher's own on the validation split." if level is not None else ""
        )
        is_log = spans_much(every)
        found[field] = Drawing(title, partial(draw, since=0, is_log=is_log), caption, told)
        half = (
            max(
                step for run in runs for step, _ in points(run, "validation", field) or [(run.num_steps, 0.0)]
            )
            // 2
        )
        if is_log and any(step >= half for run in runs for step, _ in points(run, "validation", field)):
            late = f"The same from step {half} on, on a linear axis."
            draw_late = partial(draw, since=half, is_log=False)
            found[f"{field}_late"] = Drawing(f"{title}, second half", draw_late, late, told)
    return found


def cost_drawings(runs: Sequence[RunRecord]) -> list[Drawing]:
    return [
        Drawing(title, partial(_draw_costs, runs=runs, field=field, unit=unit, factor=factor), caption)
        for field, (title, unit, factor, caption) in COSTS.items()
        if any(points(run, "step", field) for run in runs)
    ]


def calibration_drawing(runs: Sequence[RunRecord]) -> Drawing | None:
    """At the last validation of each run, beside the teacher's on the same positions; None where no run has it."""
    found: dict[str, tuple[Reliability, Series | None]] = {}
    for number, (name, run) in enumerate(zip(labels(runs), runs, strict=True)):
        record = run.last_validation
        own, teacher = (Reliability.read(record.get(key)) for key in ("reliability", "teacher_reliability"))
        if own is not None:
            found[name] = (own, Series(number))
        if teacher is not None:
            found.setdefault("teacher", (teacher, None))
    return draw_reliability(found) if found else None


def _told(runs: Sequence[RunRecord], field: str) -> str:
    parts = []
    for name, run in zip(labels(runs), runs, strict=True):
        found = points(run, "validation", field) or points(run, "step", field)
        if found:
            (first, before), (last, after) = found[0], found[-1]
            parts.append(f"{name}: {before:.3f} at step {first}, {after:.3f} at step {last}")
    return "; ".join(parts)


def _draw_losses(
    axes: Any,
    *,
    runs: Sequence[RunRecord],
    field: str,
    level: float | None,
    named: bool,
    since: int,
    is_log: bool,
) -> None:
    for number, (name, run) in enumerate(zip(labels(runs), runs, strict=True)):
        series = Series(number)
        trained = [one for one in _running_mean(points(run, "step", field)) if one[0] >= since]
        if trained:
            axes.plot(*zip(*trained, strict=True), linewidth=0.9, alpha=0.55, color=series.color)
        validated = [one for one in points(run, "validation", field) if one[0] >= since]
        if validated:
            every = -(-len(validated) // MAX_MARKERS)
            style = series.points(name if named else None)
            marked = ((len(validated) - 1) % every, every)  # the last one among them
            axes.plot(*zip(*validated, strict=True), **style, markevery=marked)
    if level is not None:
        axes.axhline(level, color=REFERENCE, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"teacher {level:.3f}",
            (0.99, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
        )
    if is_log:
        set_log(axes)
    axes.set(xlabel="step", ylabel=f"{UNIT} (log scale)" if is_log else UNIT)
    add_legend(axes)


def _draw_costs(axes: Any, *, runs: Sequence[RunRecord], field: str, unit: str, factor: float) -> None:
    values = []
    for number, run in enumerate(runs):
        series = Series(number)
        scaled = [(step, value * factor) for step, value in points(run, "step", field)]
        values += [value for _, value in scaled]
        if scaled:
            axes.plot(*zip(*scaled, strict=True), linewidth=1, color=series.color, linestyle=series.dashes)
    is_log = field == "grad_norm" and spans_much(values)
    if is_log:
        set_log(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel=f"{unit} (log scale)" if is_log else unit)


def _running_mean(values: Points) -> Points:
    width = max(1, round(len(values) * SMOOTHED))
    windows = (values[max(0, i - width) : i + width + 1] for i in range(len(values)))
    return [
        (step, statistics.fmean(value for _, value in window))
        for (step, _), window in zip(values, windows, strict=True)
    ]
