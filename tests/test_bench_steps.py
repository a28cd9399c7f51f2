"""The benchmark of balanced steps: what its tables are made of, without a machine's times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import bench_steps, tables
from tests.benchmarks.tables import Bench, Table


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    return tmp_path


def test_a_dearer_round_leaves_fewer_rounds_and_a_longer_path(kept: Path) -> None:
    bench_steps.prices(Bench("steps"), bench_steps.lengths_of("no folder"))
    table = Table.read(kept / "steps-price.json")
    assert [row[0] for row in table.rows] == [f"{price} tokens" for price in bench_steps.PRICES]
    cells = [[cell.rstrip(")").split(" (") for cell in row[1:]] for row in table.rows]
    cheap, dear = np.array(cells, dtype=float)
    assert (cheap[:, 1] >= dear[:, 1]).all()
    assert (cheap[:, 0] <= dear[:, 0]).all()
    assert (cheap[:, 1] > dear[:, 1]).any()


def test_what_a_picture_costs_by_the_models_shapes(kept: Path) -> None:
    """A trained tower costs three times a frozen one, and the larger model's tokens cost more than its pictures."""
    bench_steps.pictures(Bench("steps"))
    small, large = sorted(
        ([float(cell) for cell in row[1:]] for row in Table.read(kept / "steps-pictures.json").rows),
        reverse=True,
    )
    assert small[1] == pytest.approx(3 * small[0], abs=2)
    assert large[1] == pytest.approx(3 * large[0], abs=2)
    assert small[0] > large[0]
