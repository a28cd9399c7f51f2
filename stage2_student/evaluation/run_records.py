"""What runs left on disk, read for tables, curves and reports.

    runs = read_runs([Path("work/runs/soft"), Path("work/runs/hard")])
    points(runs[0], "validation", "kl")

A run that is not finished is read with what it has logged.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import yaml

from shared.errors import CheckpointError, RecipeError
from shared.recipes import Split, yaml12
from shared.recipes.policies import DEFAULT_TAIL
from shared.regular_files import read_regular
from stage2_student.evaluation.evaluated import STUDENT
from stage2_student.evaluation.scores import Scores, read_all
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.files import are_numbers
from stage2_student.runs.identity import flat
from stage2_student.runs.run_folder import Metrics, RunFolder


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk.

    settings         the resolved recipe, flat: ``loss.kd_ratio`` and so on
    losses           of the last validation, nats a position; None for what was not computed.  ``kl`` is at
                     temperature 1 for every run, where ``kd_loss`` is as the run's own loss has it
    teacher_ce       of the same positions, from the cache; None where no validation had one.  ``teacher_ce_of`` has
                     that of several
    answered         what was asked, the most questions first; empty where nothing was
    asked            which of them ``scores`` are of: those that the runs compared have in common
    positions_per_s  over all steps, waits for data included
    step_s           median
    peak_memory_gib  of the first rank
    num_epochs       done; None where the log does not tell
    reading_s        time that steps waited for data, of all ranks: all that the cache can have cost them
    caches           where they lie; none for plain fine-tuning
    is_mix           they hold the same rows
    records          the lines of metrics.jsonl, with ``kl`` where ``kd_loss`` is one
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
    caches: tuple[str, ...]
    is_mix: bool
    records: tuple[dict[str, Any], ...]

    @property
    def scores(self) -> dict[str, Any]:
        """Of the student's answers, as ``evaluate`` writes them; empty where none were asked."""
        return self.asked.models[STUDENT] if self.asked is not None else {}

    @property
    def last_validation(self) -> dict[str, Any]:
        """Its line of the log; empty where there was none."""
        return next((one for one in reversed(self.records) if one["event"] == "validation"), {})

    @property
    def has_other_vocabulary(self) -> bool:
        """Than its teacher's, so that its teacher's losses are divided by the student's positions."""
        return "shared_positions" in self.last_validation

    def to_json(self) -> dict[str, Any]:
        hidden = ("records", "answered", "asked")
        values = {name: value for name, value in asdict(self).items() if name not in hidden}
        split = None if self.asked is None else self.asked.split
        cache = ", ".join(self.caches) or None
        return values | {"path": str(self.path), "split": split, "scores": self.scores, "cache": cache}


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Each run once, in their order.  Files among them, as the logs of a sweep in ``runs/*``, are left out, and said.

    Raises   RecipeError  when a folder has no run in it, or none is left
    """
    files = [path for path in paths if path.is_file()]
    if files:
        click.echo(f"note: no folders of runs, left out: {', '.join(map(str, files))}", err=True)
    folders = {os.path.realpath(path): path for path in paths if path not in files}
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
    folder.require_as_written()
    settings = _read_settings(folder.recipe)
    # Before the log: of a run that goes on meanwhile, the log is ahead of these.
    results, newest = folder.read_results(), folder.checkpoints.latest()
    metrics = _with_kl(folder.read_metrics(), settings)
    steps = metrics.steps
    _require_whole_log(folder, metrics, results, newest)
    last = metrics.validations[-1] if metrics.validations else {}
    split: Split = "train" if settings.get("data.splits.validation") is None else "validation"
    answered = read_all(folder.evaluation, split)
    return RunRecord(
        name=str(settings["run.name"]),
        path=path,
        is_finished=results is not None,
        num_steps=steps[-1]["step"] if steps else 0,
        settings=settings,
        losses={name: last.get(name) for name in ("loss", "ce_loss", "kl", "soft_ce")},
        teacher_ce=last.get("teacher_ce_loss"),
        answered=answered,
        asked=answered[0] if answered else None,
        positions_per_s=metrics.positions_per_s,
        step_s=statistics.median(record["step_s"] for record in steps) if steps else None,
        peak_memory_gib=max((record["peak_memory_gib"] for record in steps), default=None),
        num_epochs=steps[-1].get("num_epochs") if steps else 0.0,
        reading_s=metrics.wait_s * folder.num_ranks(),
        caches=_caches(settings) if settings["loss.kd_ratio"] > 0 else (),
        is_mix=settings.get("cache.mix") is not None,
        records=metrics.records,
    )


def _require_whole_log(
    folder: RunFolder, metrics: Metrics, results: dict[str, Any] | None, newest: Checkpoint | None
) -> None:
    """Raises   CheckpointError  when the log ends before the last step or validation of a finished run, or its newest
    checkpoint
    """
    logged = metrics.steps[-1]["step"] if metrics.steps else 0
    if results is not None and results.get("after") is not None:  # of the last step's validation
        logged = min(logged, metrics.validations[-1]["step"] if metrics.validations else 0)
    known = {
        folder.results.name: 0 if results is None else results["step"],
        "its newest checkpoint": 0 if newest is None else newest.facts.step,
    }
    for what, step in known.items():
        if logged < step:
            raise CheckpointError(
                f"{folder.metrics.path}: ends at step {logged}, and {what} says {step}; the log was cut or is "
                "missing. Put it back, or leave the run out"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    """Flat.  Not by the rules of recipes, which may have changed since the run."""
    try:
        settings = flat(yaml12.load(read_regular(path).decode()))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(
            f"{path}: not YAML ({error}); put the run's own recipe back, or leave the run out"
        ) from error
    needed = ["run.name", "loss.temperature", "loss.kd_ratio"]
    numbers = are_numbers(settings, *needed[1:])
    missing = [name for name in needed if settings.get(name) is None]
    if numbers and settings["loss.kd_ratio"] > 0 and not _caches(settings):
        missing.append("cache.path")
    if missing or not numbers:
        raise RecipeError(
            f"{path}: {', '.join(missing) or 'loss'} is missing or damaged, so this is not a run's recipe; "
            "put it back, or leave the run out"
        )
    return settings


def _caches(settings: dict[str, Any]) -> tuple[str, ...]:
    """Of a list, a mix, or the one; empty where the recipe names none, or something else stands there."""
    path, mixed = settings.get("cache.path"), settings.get("cache.mix")
    found: Any = [path] if isinstance(path, str) else path
    if isinstance(mixed, list):
        found = [one.get("path") if isinstance(one, dict) else None for one in mixed]
    is_sound = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return tuple(found) if is_sound else ()


def _with_kl(metrics: Metrics, settings: dict[str, Any]) -> Metrics:
    """Steps, and validations of old runs, have no KL of their own: ``kd_loss`` is it where nothing makes it another.

    That is another temperature than 1, weights or a choice of positions, and a tail that adds to what was cut off.
    """
    is_of_some = settings.get("loss.visual_weight") or settings.get("loss.positions.keep") is not None
    is_bound = settings.get("loss.tail") in (None, DEFAULT_TAIL)  # null for all sampled targets, too
    if settings["loss.temperature"] != 1.0 or is_of_some or not is_bound:
        return metrics
    return Metrics(tuple({"kl": record.get("kd_loss")} | record for record in metrics.records))


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What to call each run: its name, or its folder where several have that name."""
    times = Counter(run.name for run in runs)
    return [run.name if times[run.name] == 1 else str(run.path) for run in runs]


def teacher_ce_of(runs: Sequence[RunRecord]) -> float | None:
    """Of the first run that knows it; a run with another vocabulary has it by its own positions, and comes last."""
    found = [run for run in runs if run.teacher_ce is not None]
    return next((run.teacher_ce for run in sorted(found, key=lambda run: run.has_other_vocabulary)), None)


def points(run: RunRecord, event: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of each record of that kind which has one."""
    return [(r["step"], r[field]) for r in run.records if r["event"] == event and r.get(field) is not None]
