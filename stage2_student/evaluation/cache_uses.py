"""When the cache of some runs has paid: what it cost, against a live teacher beside each of them.

for use in cache_uses(runs):
    click.echo(use.line())
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from shared.cache.log import log_records
from shared.cache.manifest import load_manifest
from shared.cache.storage import open_folder
from shared.errors import TeachonceError
from shared.reports.break_even import TeacherCosts
from stage2_student.evaluation.run_records import RunRecord
from stage2_student.runs.files import are_numbers

IN_CAPTURES = ("positions", "seconds", "ranks", "teacher_ms")  # numbers of a record in a cache's log


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
    """One for each cache, or list or mix of caches, whose logs tell how long their captures took.

    A live teacher is taken to need, for each position of an epoch, what the teacher itself needed in the capture.
    Waits for data count as the cache's in full.  Runs whose epochs are unknown are left out.
    """
    found = []
    for caches, is_mix in dict.fromkeys((run.caches, run.is_mix) for run in runs if run.caches):
        captured = captured_together(caches, is_mix=is_mix)
        epochs = {
            run.path: run.num_epochs
            for run in runs
            if (run.caches, run.is_mix) == (caches, is_mix) and run.num_epochs
        }
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
            CacheUse(
                ", ".join(caches),
                len(trained),
                num_epochs,
                TeacherCosts(captured.seconds, live_epoch_s, reading_s),
            )
        )
    return found


@dataclass(frozen=True)
class CapturedTimes:
    """Seconds of one device: of all that a cache holds, and the teacher's own among them."""

    seconds: float
    teacher_s: float
    num_positions: int


def captured_together(locations: Sequence[str], *, is_mix: bool) -> CapturedTimes | None:
    """Of all of them; None where one of them does not tell.  The caches of a mix hold the same positions."""
    found = [captured_times(location) for location in locations]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    count = max if is_mix else sum
    return CapturedTimes(
        sum(one.seconds for one in known),
        sum(one.teacher_s for one in known),
        count(one.num_positions for one in known),
    )


def captured_times(location: str) -> CapturedTimes | None:
    """From the captures in a cache's log; None where it has none whose teacher was timed, which old ones have not.

    A capture that was stopped has logged nothing: its part is taken to have cost what the others did.
    """
    try:
        folder = open_folder(location)
        log = log_records(folder)
        manifest = load_manifest(folder)
    except (OSError, TeachonceError):
        return None
    records = [
        record for record in log if record.get("event") == "captured" and are_numbers(record, *IN_CAPTURES)
    ]
    positions = sum(record["positions"] for record in records)
    if manifest is None or not positions:
        return None
    held = manifest.totals.positions
    seconds = sum(record["seconds"] * record["ranks"] for record in records)
    teacher_s = sum(record["teacher_ms"] for record in records) / 1e3
    return CapturedTimes(seconds * held / positions, teacher_s * held / positions, held)
