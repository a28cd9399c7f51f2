"""The benchmark of targets: sizes at equal errors, and what its tables are named."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest

from tests.benchmarks.bench_targets import (
    FP16,
    RATIOS,
    STUDENTS,
    Line,
    figures,
    name_of,
    of_students,
    ratios_at_errors,
)
from tests.benchmarks.synthetic_teacher import Student


def lines_of(family: str, *points: tuple[float, float]) -> list[Line]:
    """Of these bytes and errors."""
    return [Line(family, family, 1, size, size, size, error, error) for size, error in points]


THRESHOLD = lines_of("threshold", (10, 0.2), (20, 0.05), (40, 0.02))
IN_FP16 = lines_of(FP16, (25, 0.05), (50, 0.02))
RANDOM = lines_of("random", (20, 0.3), (40, 0.035))
TOP_K = lines_of("top_k", (60, 0.06), (100, 0.01))


def test_sizes_are_compared_with_values_that_are_stored_alike_as_well() -> None:
    rows = {
        row[0]: dict(zip(RATIOS, row, strict=True)) for row in ratios_at_errors(THRESHOLD + IN_FP16 + TOP_K)
    }
    row = rows["0.05"]
    both = [float(row[name]) for name in ("top_k with its best tail / threshold", f"the same / {FP16}")]
    assert both[0] / both[1] == pytest.approx(25 / 20, rel=0.01)
    assert rows["0.1"][f"the same / {FP16}"] == "-"
    shown = figures(THRESHOLD + IN_FP16 + TOP_K, {})
    assert any(FP16 in name for name, *_ in shown)
    assert not any(FP16 in name for name, *_ in figures(THRESHOLD + TOP_K, {}))


def test_a_family_is_beyond_its_own_range() -> None:
    """Whatever others reach: random's largest is worse than 0.025, and top_k's is not."""
    rows = {
        row[0]: dict(zip(RATIOS, row, strict=True)) for row in ratios_at_errors(THRESHOLD + RANDOM + TOP_K)
    }
    ratio = "random / threshold"
    assert float(rows["0.035"][ratio]) > 1
    assert rows["0.025"][ratio].startswith("over 1.")
    assert rows["0.1"]["top_k with its best tail / threshold"] == "-"  # its smallest is better than that
    assert not rows["0.025"]["top_k with its best tail / threshold"].startswith("over")


@pytest.mark.parametrize(
    ("positions", "vocab", "file", "name"),
    [
        (4096, 248_320, None, "targets"),
        (64, 248_320, None, "targets-other"),
        (4096, 500, None, "targets-other"),
        (4096, 248_320, "some.pt", "targets-real"),
    ],
)
def test_a_table_of_other_sizes_has_another_name(
    positions: int, vocab: int, file: str | None, name: str
) -> None:
    assert name_of(Namespace(positions=positions, vocab=vocab, distributions=file)) == name


def test_other_students_and_states_without_a_mean_have_sizes_of_their_own() -> None:
    own = [replace(one, error_isotropic=1.5 * one.error) for one in THRESHOLD + TOP_K]
    near, far = Student(), Student(taste=0.5, noise=1.0)
    rows = [dict(zip(STUDENTS, row, strict=True)) for row in of_students({near: own, far: THRESHOLD})]
    assert [(row["student"], row["mean cosine"]) for row in rows] == [
        ("0.75 b + 1.5 e", "0.5"),
        ("0.75 b + 1.5 e", "0"),
        ("0.5 b + 1 e", "0.5"),
    ]
    bytes_of = [float(row["threshold, bytes"]) for row in rows]
    assert bytes_of[0] == bytes_of[2] < bytes_of[1]
    assert float(rows[0]["top_k with its best tail / threshold"]) > 1
    assert rows[2]["random / threshold"] == "-"
