"""The benchmark of students: which runs it makes, and how its tables are made of what was measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import student_results
from tests.benchmarks.bench_students import bounded, drawn, largest_within, timed_jobs
from tests.benchmarks.peers.live import LiveTeacher
from tests.benchmarks.student_results import LABELS, LIVE, TIMED, Results, keep, mean


def test_steps_are_timed_with_a_seed_that_was_asked_for() -> None:
    """The caches of others have not been captured."""
    jobs = timed_jobs("phantom", {LABELS: None, LIVE: LiveTeacher()}, seeds=[1, 2], kd_ratio=0.5)
    assert [job.key for job in jobs] == [
        ["phantom", LABELS, TIMED, 1, 0.0],
        ["phantom", LIVE, TIMED, 1, 0.5],
    ]


@pytest.mark.parametrize(
    ("seeds", "quartiles", "shown"),
    [
        ([0], True, "1.500 (1.250 to 1.750)"),
        ([1], False, "1.500"),
        ([0, 1], True, "1.600 (1.500 to 2.000)"),
        ([0, 1], False, "1.600"),
    ],
)
def test_times_of_any_seed_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[int], quartiles: bool, shown: str
) -> None:
    path = tmp_path / "students.jsonl"
    keep(["phantom", LABELS, "1 epoch", 1, 0.0], {"kl": 0.5}, path, fingerprint="a")
    for place, seed in enumerate(seeds):
        found = {"step": 1.5 + 0.2 * place, "step_quartiles": [1.25 + 0.5 * place, 1.75 + 0.5 * place]}
        key = ["phantom", LABELS, TIMED, seed, 0.0]
        keep(key, found if quartiles else {"step": found["step"]}, path, fingerprint="a")
    monkeypatch.setattr(student_results, "RESULTS", path)
    assert Results("phantom", 0.5, fingerprint="a").costs()[0][:2] == [LABELS, shown]
    assert Results("phantom", 0.5, fingerprint="b").costs() == []


@pytest.mark.parametrize(("wanted", "found"), [(35, 3), (39, 3), (40, 4), (5, 1), (10_000, 100)])
def test_equal_size_is_the_largest_that_is_not_above(wanted: int, found: int) -> None:
    """Not the nearest: another policy must not win by a larger cache.  One where even that is above."""
    assert largest_within(lambda number: 10 * number, wanted, most=100) == found


@pytest.mark.parametrize(("num_examples", "number"), [(4000, 256), (1200, 256), (1200, 32)])
def test_sizes_are_chosen_by_examples_of_each_kind(num_examples: int, number: int) -> None:
    """``phantom`` has five questions a picture, and only one of them asks for a long answer."""
    places = drawn(num_examples, number)
    assert len(set(places)) == number
    of_kind = np.bincount(places % 5, minlength=5)
    assert (of_kind > number / 5 / 4).all(), of_kind
    assert len(drawn(7, number)) == 7


@pytest.mark.parametrize(("most", "found"), [(0, [3]), (7, [3, 4]), (8, [3, 4]), (100, [3, 4, 5, 1])])
def test_what_sizes_are_chosen_by_fits_into_memory(most: int, found: list[int]) -> None:
    examples: Any = [SimpleNamespace(num_positions=number) for number in (3, 4, 5, 1)]
    assert [one.num_positions for one in bounded(examples, most)] == found


def test_a_cache_that_came_out_larger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "students.jsonl"
    for variant, size in {
        "tau 1/512": 34.0,
        "tau 1/64": 18.0,
        "top 11, ghost": 42.4,
        "random 74": 17.0,
    }.items():
        key = ["phantom", variant, "1 epoch", 0, 0.5]
        keep(key, {"bytes_per_position": size}, path, fingerprint="a")
    found = Results("phantom", 0.5, path, fingerprint="a")
    at_most = {"top 11": "tau 1/512", "random 74": "tau 1/64", "random 593": "tau 1/512"}
    assert found.notes(at_most).endswith(" compared with: top 11, ghost (42.4 bytes, tau 1/512 has 34.0).")
    assert found.notes({"random 74": "tau 1/64"}) == "One seed."
    keep(["phantom", "random 74", "1 epoch", 1, 0.5], {"kl": 0.5}, path, fingerprint="a")
    found = Results("phantom", 0.5, path, fingerprint="a")
    assert found.notes({}) == "Means over seeds, half their range in brackets."


def test_half_the_range_needs_two_seeds() -> None:
    assert [mean(values, ".2f") for values in ([], [0.5], [0.5, 0.7])] == ["-", "0.50", "0.60 (0.10)"]
