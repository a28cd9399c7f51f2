"""The tables of docs/scaling.md: that their arithmetic is right, and that they are what the script prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.scale import (
    SCALES,
    Inputs,
    Scale,
    claims_table,
    even_time,
    finish_time,
    some_speeds,
    table,
)

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_document_holds_what_the_script_prints() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert "\n".join(table(Inputs())) in text
    assert "\n".join(claims_table()) in text


def test_by_hand() -> None:
    inputs = Inputs(positions=10, prompt_tokens=90, teacher=5.0, student=2.0, flops=1000.0)
    scale = Scale("", 1000, "", 2.0, 300)
    assert scale.num_shards == 4
    assert scale.cache_bytes(inputs) == 20_000
    assert inputs.capture_s == 1.0  # 2 x 5 x 100 / 1000
    assert inputs.training_s == 1.2
    assert scale.capture_hours(inputs, 10) == pytest.approx(100 / 3600)
    assert scale.read_bytes_per_s(inputs) == pytest.approx(20 / 1.2)
    assert scale.claims_per_s(inputs, 600) == pytest.approx(2.0)
    assert [one.num_segments for one in SCALES] == [1, 5, 6]
    assert scale.manifest_bytes(inputs) == sum(inputs.manifest_bytes)
    assert scale.list_bytes(inputs) == 320


def test_nobody_is_faster_than_all_ranks_to_the_end() -> None:
    for num_units in (1, 7, 64, 500):
        speeds = some_speeds(16)
        assert finish_time(num_units, speeds) >= num_units / speeds.sum() - 1e-9
        assert finish_time(num_units, speeds) <= even_time(num_units, speeds) + 2


def test_smaller_units_waste_less() -> None:
    speeds = some_speeds(32)
    waste = [finish_time(32 * units, speeds) / (32 * units / speeds.sum()) for units in (1, 8, 64)]
    assert waste == sorted(waste, reverse=True)
    assert waste[-1] < 1.03


def test_equal_ranks_end_together() -> None:
    assert finish_time(12, np.ones(4)) == even_time(12, np.ones(4)) == 3.0
