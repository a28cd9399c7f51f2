"""The benchmark of whole recipes: what its tables are made of."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.bench_runs import HEAD, by_step, differences, losses_of, summary


def test_losses_by_step_of_training_and_of_validations(tmp_path: Path) -> None:
    records = [
        {"event": "validation", "step": 0, "loss": 3.0},
        {"event": "step", "step": 1, "loss": 2.0},
        {"event": "checkpoint", "step": 1},
        {"event": "validation", "step": 1, "loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    found = losses_of(tmp_path)
    assert found == {"step": {1: 2.0}, "validation": {0: 3.0, 1: 2.5}}
    other = {"step": {1: 2.000002}, "validation": {0: 3.0, 1: 2.5}}
    assert differences(found, other) == [
        ["1", "2.000000", "2.000002", "1e-06"],
        ["validation", "2.500000", "2.500000", "0e+00"],
    ]
    head, rows = by_step([("one rank", found["validation"]), ("two ranks", other["validation"])])
    assert head == ["", "0", "1"]
    assert rows == [["one rank", "3.0000", "2.5000"], ["two ranks", "3.0000", "2.5000"]]


def test_a_run_without_a_cache_has_no_kd(tmp_path: Path) -> None:
    losses = {"ce_loss": 2.0, "kd_loss": None, "kl": None}
    results = {
        "step": 7,
        "before": losses | {"ce_loss": 3.0},
        "after": losses,
        "answers": {"accuracy": {"mean": 0.25, "count": 8}},
        "cache": None,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    row = dict(zip(HEAD, summary(tmp_path, 1200), strict=True))
    assert (row["run"], row["rows"], row["steps"]) == (f"`{tmp_path.name}`", "1,200", "7")
    assert (row["CE before"], row["CE after"]) == ("3.000", "2.000")
    assert [row[name] for name in ("KD before", "KD after", "KL after", "bytes")] == ["-"] * 4
    assert row["right"] == "25.0% of 8"
