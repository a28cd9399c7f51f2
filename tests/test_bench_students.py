"""The benchmark of students: which runs it makes, and how its tables are made of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import student_results
from tests.benchmarks.bench_students import largest_within, timed_jobs
from tests.benchmarks.peers.live import LiveTeacher
from tests.benchmarks.student_results import LABELS, LIVE, TIMED, Results


def test_steps_are_timed_with_a_seed_that_was_asked_for() -> None:
    """The caches of others have not been captured."""
    jobs = timed_jobs("phantom", {LABELS: None, LIVE: LiveTeacher()}, seeds=[1, 2], kd_ratio=0.5)
    assert [job.key for job in jobs] == [
        ["phantom", LABELS, TIMED, 1, 0.0],
        ["phantom", LIVE, TIMED, 1, 0.5],
    ]


@pytest.mark.parametrize(("seeds", "shown"), [([0], "1.500"), ([1], "1.500"), ([0, 1], "1.600")])
def test_times_of_any_seed_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[int], shown: str
) -> None:
    records = [{"key": ["phantom", LABELS, "1 epoch", 1, 0.0], "kl": 0.5}]
    records += [
        {"key": ["phantom", LABELS, TIMED, seed, 0.0], "step": 1.5 + 0.2 * place}
        for place, seed in enumerate(seeds)
    ]
    path = tmp_path / "students.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(student_results, "RESULTS", path)
    assert Results("phantom", 0.5).costs()[0][:2] == [LABELS, shown]


@pytest.mark.parametrize(("wanted", "found"), [(35, 3), (39, 3), (40, 4), (5, 1), (10_000, 100)])
def test_equal_size_is_the_largest_that_is_not_above(wanted: int, found: int) -> None:
    """Not the nearest: another policy must not win by a larger cache.  One where even that is above."""
    assert largest_within(lambda number: 10 * number, wanted, most=100) == found
