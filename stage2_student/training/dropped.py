"""Rows that turn out to be unusable in the middle of a run, against the number that may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.errors import DataError
from stage2_student.runs.run_folder import Metrics
from stage2_student.training.survey import Survey

EVENT = "dropped"  # of a line in the log


class Dropped:
    """Of one split, each row once however often it is met.

    allowed  in all, those that the survey has left out among them
    before   reasons that the run has logged already; a row of them that the survey has left out too counts once
    """

    def __init__(self, survey: Survey, *, allowed: int, before: Iterable[str]) -> None:
        self._survey = survey
        self._allowed = allowed
        self._reasons = by_row(survey, before)

    @property
    def split(self) -> str:
        return self._survey.split.name

    def add(self, reasons: Sequence[str]) -> list[str]:
        """Those that are new.

        Raises   DataError  with the first row that is one too many
        """
        found = by_row(self._survey, reasons)
        new = {row: reason for row, reason in found.items() if row not in self._reasons}
        for row, reason in new.items():
            self._reasons[row] = reason
            number = len(self._survey.dropped) + len(self._reasons)
            if number > self._allowed:
                raise DataError(
                    f"{reason}. That makes {number} left out, data.max_dropped allows {self._allowed}"
                )
        return list(new.values())


def by_row(survey: Survey, reasons: Iterable[str]) -> dict[int | str, str]:
    """Of rows that the survey has, by their numbers; what names no row stands for itself."""
    found: dict[int | str, str] = {}
    for reason in reasons:
        row = survey.split.row_of(reason)
        if row is None or row in survey.rows:
            found.setdefault(reason if row is None else row, reason)
    return found


def dropped_so_far(metrics: Metrics, split: str) -> list[str]:
    """Reasons in the log."""
    found = [one for one in metrics.records if one["event"] == EVENT and one.get("split") == split]
    return [str(reason) for one in found for reason in one.get("reasons", ())]
