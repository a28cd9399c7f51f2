"""A sweep as curves: each measure against each setting, one line for a combination of the others.

page += [figure(drawing) for drawing in sweep_drawings(runs)]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from shared.reports.figures import Drawing, Series, add_legend, set_log
from shared.reports.text import label
from stage2_student.evaluation.compare import differing
from stage2_student.evaluation.run_records import RunRecord

LOG_FROM = 10.0  # largest over smallest value of a setting, from which on its axis is logarithmic
MAX_TICKS = 8
MEASURES: dict[str, tuple[str, Callable[[RunRecord], float | None]]] = {
    "CE": ("cross-entropy (nats per position)", lambda run: run.losses["ce_loss"]),
    "KL": ("KL from the teacher (nats per position)", lambda run: run.losses["kl"]),
    "Right": ("% of short answers right", lambda run: _per_cent(run, "accuracy")),
    "F1": ("mean token F1 (%)", lambda run: _per_cent(run, "token_f1")),
}

Lines = dict[str, list[tuple[Any, float]]]  # by the other settings: (value of the setting, measure)


def sweep_drawings(runs: Sequence[RunRecord]) -> list[Drawing]:
    """Of finished runs; for settings of which two values can be compared, all else being equal."""
    finished = [run for run in runs if run.is_finished]
    settings = differing(finished) if len(finished) > 1 else []
    found = []
    for setting in settings:
        others = [other for other in settings if other != setting]
        for measure, (unit, value) in MEASURES.items():
            lines = _lines(finished, setting, others, value)
            if any(len(line) > 1 for line in lines.values()):
                found.append(_drawing(setting, measure, unit, lines))
    return found


def _lines(
    runs: Sequence[RunRecord],
    setting: str,
    others: Sequence[str],
    measure: Callable[[RunRecord], float | None],
) -> Lines:
    lines: Lines = {}
    for run in runs:
        y = measure(run)
        if y is not None:
            name = ", ".join(f"{_word(other)} {_plain(run.settings.get(other))}" for other in others)
            lines.setdefault(name, []).append((run.settings.get(setting), y))
    return lines


def _drawing(setting: str, measure: str, unit: str, lines: Lines) -> Drawing:
    told = "; ".join(
        f"{name or 'all runs'}: " + ", ".join(f"{y:.4g} at {_plain(x)}" for x, y in _in_order(line))
        for name, line in lines.items()
    )
    caption = "Each point is a finished run."
    if any(lines):
        caption += " Runs on one line differ in nothing else."
    return Drawing(
        f"{measure} against {setting}", partial(_draw, lines=lines, setting=setting, unit=unit), caption, told
    )


def _draw(axes: Any, *, lines: Lines, setting: str, unit: str) -> None:
    values = [x for line in lines.values() for x, _ in line]
    is_numeric = all(_is_number(value) for value in values)
    ticks: list[Any] = sorted(set(values)) if is_numeric else sorted(set(map(_plain, values)))
    for number, (name, line) in enumerate(lines.items()):
        points = [(x if is_numeric else ticks.index(_plain(x)), y) for x, y in _in_order(line)]
        style = Series(number).points(name or None)
        if not is_numeric:  # between names there is nothing
            style["linestyle"] = "none"
        axes.plot(*zip(*points, strict=True), **style)
    if not is_numeric:
        axes.set_xticks(range(len(ticks)), list(map(label, ticks)))
    elif min(ticks) > 0 and max(ticks) / min(ticks) >= LOG_FROM:
        set_log(axes, "x")
    if is_numeric and len(ticks) <= MAX_TICKS:
        axes.set_xticks(ticks, [_plain(tick) for tick in ticks])
    axes.margins(x=0.08, y=0.12)
    axes.set(xlabel=setting, ylabel=unit)
    add_legend(axes)


def _in_order(line: Sequence[tuple[Any, float]]) -> list[tuple[Any, float]]:
    return sorted(
        line, key=lambda point: (0, point[0], "") if _is_number(point[0]) else (1, 0, _plain(point[0]))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(setting: str) -> str:
    return setting.rpartition(".")[2]


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _per_cent(run: RunRecord, score: str) -> float | None:
    found = (run.scores.get(score) or {}).get("mean")
    return None if found is None else 100 * float(found)
