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
    before   reasons that the run has logged already
    """

    def __init__(self, survey: Survey, *, allowed: int, before: Iterable[str]) -> None:
        self._survey = survey
        self._allowed = allowed
        self._reasons = dict.fromkeys(before)

    @property
    def split(self) -> str:
        return self._survey.split.name

    def add(self, reasons: Sequence[str]) -> list[str]:
        """Those that are new.

        Raises   DataError  with the first row that is one too many
        """
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self._reasons]
        for reason in new:
            self._reasons[reason] = None
            number = len(self._survey.dropped) + len(self._reasons)
            if number > self._allowed:
                raise DataError(
                    f"{reason}. That makes {number} left out, data.max_dropped allows {self._allowed}"
                )
        return new


def dropped_so_far(metrics: Metrics, split: str) -> list[str]:
    """Reasons in the log."""
    found = [one for one in metrics.records if one["event"] == EVENT and one.get("split") == split]
    return [str(reason) for one in found for reason in one.get("reasons", ())]
