"""Runs side by side: the settings in which they differ, what they came to, and when their cache has paid.

    rows = [read_run(Path("work/runs/soft")), read_run(Path("work/runs/hard"))]
    click.echo("\\n".join(table(rows)))

Everything is read from what the runs left on disk.  A run that is not finished is shown with what it has logged.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml

from shared.cache.layout import LOG_NAME
from shared.cache.manifest import load_manifest
from shared.cache.storage import open_folder
from shared.errors import RecipeError, TeachonceError
from shared.recipes import Split
from shared.reports.break_even import TeacherCosts
from shared.reports.figures import require_matplotlib, save_png
from stage2_student.evaluation.evaluated import STUDENT, TEACHER
from stage2_student.evaluation.scores import Scores, read_all
from stage2_student.runs.files import are_numbers, json_objects, write_json
from stage2_student.runs.identity import flat
from stage2_student.runs.run_folder import Metrics, RunFolder

UNIMPORTANT = ("run.name", "run.root", "bootstrap.")  # differ by nature, or make what is named elsewhere
FIRST_KEYS = {"teacher": "teacher.model", "cache": "cache.path"}  # of sections that a recipe may lack
IN_CAPTURES = ("positions", "seconds", "ranks", "teacher_ms")  # numbers of a record in a cache's log
MAX_SHOWN = 40  # characters of a value


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk.

    settings         the resolved recipe, flat: ``loss.kd_ratio`` and so on
    losses           of the last validation, nats a position; None for what was not computed.  ``kl`` is at
                     temperature 1 for every run, where ``kd_loss`` is as the run's own loss has it
    teacher_ce       of the same positions, from the cache; None where no validation had one
    answered         what was asked, the most questions first; empty where nothing was
    asked            which of them ``scores`` are of: those that the runs compared have in common
    positions_per_s  over all steps, waits for data included
    step_s           median
    peak_memory_gib  of the first rank
    num_epochs       done; None where the log does not tell
    reading_s        time that steps waited for data, of all ranks: all that the cache can have cost them
    cache            where it lies; None for plain fine-tuning
    records          the lines of metrics.jsonl, with ``kl`` where a ``kd_loss`` of temperature 1 gives it
    """

    name: str
    path: Path
    is_finished: bool
    num_steps: int
    settings: dict[str, Any]
    losses: dict[str, float | None]
    teacher_ce: float | None
    answered: tuple[Scores, ...]
    asked: Scores | None
    positions_per_s: float | None
    step_s: float | None
    peak_memory_gib: float | None
    num_epochs: float | None
    reading_s: float
    cache: str | None
    records: tuple[dict[str, Any], ...]

    @property
    def scores(self) -> dict[str, Any]:
        """Of the student's answers, as ``evaluate`` writes them; empty where none were asked."""
        return self.asked.models[STUDENT] if self.asked is not None else {}

    def to_json(self) -> dict[str, Any]:
        hidden = ("records", "answered", "asked")
        values = {name: value for name, value in asdict(self).items() if name not in hidden}
        split = None if self.asked is None else self.asked.split
        return values | {"path": str(self.path), "split": split, "scores": self.scores}


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Each run once, in their order.  Files among them, as the logs of a sweep in ``runs/*``, are left out, and said.

    Raises   RecipeError  when a folder has no run in it, or none is left
    """
    files = [path for path in paths if path.is_file()]
    if files:
        click.echo(f"note: no folders of runs, left out: {', '.join(map(str, files))}", err=True)
    folders = {path.resolve(): path for path in paths if path not in files}
    if not folders:
        raise RecipeError(f"{', '.join(map(str, paths))}: there is no run among them")
    return asked_alike([read_run(path) for path in folders.values()])


def asked_alike(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs with the scores of the most questions that all of them were asked, where there are such."""
    sets = [{one.questions: one for one in run.answered} for run in runs if run.answered]
    common = set.intersection(*map(set, sets)) if sets else set()
    if not common:
        return list(runs)
    chosen = max(common, key=lambda questions: sets[0][questions].num_examples)
    return [
        replace(run, asked=next((one for one in run.answered if one.questions == chosen), None))
        for run in runs
    ]


def read_run(path: Path) -> RunRecord:
    """Raises   RecipeError      when the folder has no run in it, or its recipe is damaged
    CheckpointError  when another file of the run is damaged
    """
    folder = RunFolder(path)
    if not folder.recipe.exists():
        raise RecipeError(f"{path}: there is no run in it (no {folder.recipe.name})")
    settings = _read_settings(folder.recipe)
    metrics = _with_kl(folder.read_metrics(), temperature=settings["loss.temperature"])
    steps = metrics.steps
    results = folder.read_results()
    last = metrics.validations[-1] if metrics.validations else {}
    split: Split = "train" if settings.get("data.splits.validation") is None else "validation"
    answered = read_all(folder.evaluation, split)
    return RunRecord(
        name=str(settings["run.name"]),
        path=path,
        is_finished=results is not None,
        num_steps=steps[-1]["step"] if steps else 0,
        settings=settings,
        losses={name: last.get(name) for name in ("loss", "ce_loss", "kl")},
        teacher_ce=last.get("teacher_ce_loss"),
        answered=answered,
        asked=answered[0] if answered else None,
        positions_per_s=metrics.positions_per_s,
        step_s=statistics.median(record["step_s"] for record in steps) if steps else None,
        peak_memory_gib=max((record["peak_memory_gib"] for record in steps), default=None),
        num_epochs=steps[-1].get("num_epochs") if steps else 0.0,
        reading_s=metrics.wait_s * folder.num_ranks(),
        cache=settings["cache.path"] if settings["loss.kd_ratio"] > 0 else None,
        records=metrics.records,
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """Flat.  Not by the rules of recipes, which may have changed since the run."""
    try:
        settings = flat(yaml.safe_load(path.read_bytes()))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(
            f"{path}: not YAML ({error}); put the run's own recipe back, or leave the run out"
        ) from error
    needed = ["run.name", "loss.temperature", "loss.kd_ratio"]
    numbers = are_numbers(settings, *needed[1:])
    if numbers and settings["loss.kd_ratio"] > 0:
        needed.append("cache.path")
    missing = [name for name in needed if settings.get(name) is None]
    if missing or not numbers:
        raise RecipeError(
            f"{path}: {', '.join(missing) or 'loss'} is missing or damaged, so this is not a run's recipe; "
            "put it back, or leave the run out"
        )
    return settings


def _with_kl(metrics: Metrics, *, temperature: float) -> Metrics:
    """Steps, and validations of old runs, have no KL of their own: at temperature 1 ``kd_loss`` is it."""
    if temperature != 1.0:
        return metrics
    return Metrics(tuple({"kl": record.get("kd_loss")} | record for record in metrics.records))


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What to call each run: its name, or its folder where several have that name."""
    times = Counter(run.name for run in runs)
    return [run.name if times[run.name] == 1 else str(run.path) for run in runs]


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """The settings that not all runs share, names left out; of a section that some lack, its first key alone."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(UNIMPORTANT))
    lacking = [section for section in FIRST_KEYS if any(section in run.settings for run in runs)]
    hidden = tuple(f"{section}." for section in lacking)
    shown = [
        key
        for key in keys
        if key not in lacking and (not key.startswith(hidden) or key in FIRST_KEYS.values())
    ]
    return [key for key in shown if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]


def results(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and the cells of each run, and below them of each teacher of which something is known."""
    settings = differing(runs)
    cut = ["cut"] if any(run.scores.get("num_cut") for run in runs) else []
    head = ["run", *settings, "steps", "epochs", "CE", "KL", "questions", "right", "F1", *cut]
    head += ["positions/s", "step", "memory"]
    rows = [
        [
            label if run.is_finished else f"{label} (not finished)",
            *(_plain(run.settings.get(key)) for key in settings),
            str(run.num_steps),
            _number(run.num_epochs, ".2f"),
            _number(run.losses["ce_loss"], ".4f"),
            _number(run.losses["kl"], ".4f"),
            *_answered(run.asked, STUDENT, with_cut=bool(cut)),
            _number(run.positions_per_s, ".0f"),
            _number(run.step_s, ".3f", " s"),
            _number(run.peak_memory_gib, ".2f", " GiB"),
        ]
        for label, run in zip(labels(runs), runs, strict=True)
    ]
    for name, ce, asked in _teachers(runs):
        cells = [_number(ce, ".4f"), "-", *_answered(asked, TEACHER, with_cut=bool(cut))]
        rows.append([f"teacher {name}", *["-"] * (len(settings) + 2), *cells, *["-"] * 3])
    return head, rows


def _answered(asked: Scores | None, model: str, *, with_cut: bool) -> list[str]:
    """Cells of one model's answers: what was asked, the share that is right, F1, and how many were cut."""
    if asked is None or model not in asked.models:
        return ["-"] * (3 + with_cut)
    scores = asked.models[model]
    right, f1 = scores.get("accuracy"), scores.get("token_f1")
    cells = [
        f"{scores['num_examples']}, {asked.split}",
        f"{right['mean']:.1%} of {right['count']}" if right else "-",
        _number((f1 or {}).get("mean"), ".1%"),
    ]
    return [*cells, str(scores.get("num_cut", "-"))] if with_cut else cells


def _teachers(runs: Sequence[RunRecord]) -> list[tuple[str, float | None, Scores | None]]:
    """Name, CE and scores of each teacher of the runs, where one of the two is known."""
    found = []
    for name in dict.fromkeys(run.settings.get("teacher.model") for run in runs):
        of_it = [run for run in runs if name is not None and run.settings.get("teacher.model") == name]
        ce = next((run.teacher_ce for run in of_it if run.teacher_ce is not None), None)
        asked = next((run.asked for run in of_it if run.asked and TEACHER in run.asked.models), None)
        if ce is not None or asked is not None:
            found.append((_plain(name), ce, asked))
    return found


def table(runs: Sequence[RunRecord]) -> list[str]:
    """The results in Markdown, one line a run."""
    head, rows = results(runs)
    return [f"| {' | '.join(map(_cell, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def legend(runs: Sequence[RunRecord]) -> list[str]:
    """What the columns are, and what keeps the runs from being like."""
    lines = [
        "CE and KL: nats a position over the whole validation split; KL to the teacher, at temperature 1 for all.",
        "questions: how many were asked, and of which split; right: of those with short answers; F1: of all.",
    ]
    if len({run.asked.questions for run in runs if run.asked is not None}) > 1:
        lines.append(
            "note: the runs were not asked the same questions, so their answers cannot be compared. "
            "`train-student evaluate RUN --examples N` asks each the same N"
        )
    fewer = [
        f"{label} has {run.answered[0].num_examples}"
        for label, run in zip(labels(runs), runs, strict=True)
        if run.asked is not None and run.asked.num_examples < run.answered[0].num_examples
    ]
    if fewer:
        lines.append(
            f"note: shown for the questions that all were asked; more were answered: {', '.join(fewer)}"
        )
    return lines


@dataclass(frozen=True)
class CacheUse:
    """What a cache cost, in seconds of one device, and what was trained on it."""

    cache: str
    num_students: int
    num_epochs: float
    costs: TeacherCosts

    def line(self) -> str:
        live_s = self.costs.live_s(num_students=1, num_epochs=self.num_epochs)
        cached_s = self.costs.cached_s(num_students=1, num_epochs=self.num_epochs)
        return (
            f"{self.cache}: captured in {self.costs.capture_s:.0f} s; {self.num_students} student(s), "
            f"{self.num_epochs:.2f} epochs in all. Teacher's part: {cached_s:.0f} s with the cache, about "
            f"{live_s:.0f} s live; it {self.costs.pays_after()}"
        )


def cache_uses(runs: Sequence[RunRecord]) -> list[CacheUse]:
    """One for each cache whose log tells how long its capture took.

    A live teacher is taken to need, for each position of an epoch, what the teacher itself needed in the capture.
    Waits for data count as the cache's in full.  Runs whose epochs are unknown are left out.
    """
    found = []
    for cache in dict.fromkeys(run.cache for run in runs if run.cache is not None):
        captured = captured_times(cache)
        epochs = {run.path: run.num_epochs for run in runs if run.cache == cache and run.num_epochs}
        trained = [run for run in runs if run.path in epochs]
        if captured is None or not trained:
            continue
        epoch_positions = [
            sum(r["num_positions"] for r in run.records if r["event"] == "step") / epochs[run.path]
            for run in trained
        ]
        num_epochs = sum(epochs.values())
        live_epoch_s = captured.teacher_s * statistics.fmean(epoch_positions) / captured.num_positions
        reading_s = sum(run.reading_s for run in trained) / num_epochs
        found.append(
            CacheUse(cache, len(trained), num_epochs, TeacherCosts(captured.seconds, live_epoch_s, reading_s))
        )
    return found


def plot(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Curves of validation CE and KL over steps, one line a run; returns the pictures' paths.

    Raises   RecipeError  when matplotlib is not installed
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    return [
        save_png(partial(_draw_validations, runs=runs, field=field, title=title), folder / f"{field}.png")
        for field, title in (("ce_loss", "cross-entropy"), ("kl", "divergence from the teacher"))
    ]


def points(run: RunRecord, event: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of each record of that kind which has one."""
    return [(r["step"], r[field]) for r in run.records if r["event"] == event and r.get(field) is not None]


def _draw_validations(axes: Any, *, runs: Sequence[RunRecord], field: str, title: str) -> None:
    for number, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        if found := points(run, "validation", field):
            color = f"C{number}"  # of a run, the same in every figure
            axes.plot(*zip(*found, strict=True), marker="o", markersize=3, label=label, color=color)
    axes.set(title=f"Validation: {title}", xlabel="step", ylabel="nats a position")
    if axes.lines:
        axes.legend(frameon=False)


def save(runs: Sequence[RunRecord], path: Path) -> None:
    """Rows and break-even as JSON; ``break_even_epochs`` is null where a cache never pays."""
    uses = [
        asdict(use) | {"break_even_epochs": use.costs.to_json()["break_even_epochs"]}
        for use in cache_uses(runs)
    ]
    write_json(path, {"runs": [run.to_json() for run in runs], "caches": uses})


@dataclass(frozen=True)
class CapturedTimes:
    """Seconds of one device: of all that a cache holds, and the teacher's own among them."""

    seconds: float
    teacher_s: float
    num_positions: int


def captured_times(location: str) -> CapturedTimes | None:
    """From the captures in a cache's log; None where it has none whose teacher was timed, which old ones have not.

    A capture that was stopped has logged nothing: its part is taken to have cost what the others did.
    """
    try:
        folder = open_folder(location)
        log = folder.read(LOG_NAME)
        manifest = load_manifest(folder)
    except (OSError, TeachonceError):
        return None
    records = [
        record
        for record in json_objects(log)
        if record.get("event") == "captured" and are_numbers(record, *IN_CAPTURES)
    ]
    positions = sum(record["positions"] for record in records)
    if manifest is None or not positions:
        return None
    held = manifest.totals.positions
    seconds = sum(record["seconds"] * record["ranks"] for record in records)
    teacher_s = sum(record["teacher_ms"] for record in records) / 1e3
    return CapturedTimes(seconds * held / positions, teacher_s * held / positions, held)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _cell(text: str) -> str:
    """Of a Markdown table: what would end the cell or its line is escaped."""
    marked = text.replace("\\", "\\\\").replace("|", "\\|")
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in marked)


def _plain(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_SHOWN else f"...{text[-MAX_SHOWN:]}"
