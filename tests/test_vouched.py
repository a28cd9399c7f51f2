"""JSON of a run vouches for itself: a changed bit is damage, not another number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage2_runs import make_recipe, written_run

from shared.errors import CheckpointError
from shared.vouched import opened, vouched
from stage2_student.evaluation.evaluated import Evaluated
from stage2_student.evaluation.run_records import read_run
from stage2_student.evaluation.scores import _write, read_predictions, save
from stage2_student.runs.files import JsonLines
from stage2_student.runs.run_folder import RunFolder, scores_in

TOLD = {"step": 17, "loss": 0.25, "name": "x", "nested": {"values": [1, None, True]}, "nan": float("nan")}


def test_what_is_told_comes_back() -> None:
    assert opened(json.loads(json.dumps(vouched(TOLD | {"nan": 0})))) == TOLD | {"nan": 0}
    assert repr(opened(json.loads(json.dumps(vouched(TOLD))))) == repr(TOLD)
    assert opened({"of": "an earlier release"}) == {"of": "an earlier release"}


def test_every_flipped_bit_is_noticed_or_does_not_matter() -> None:
    sound = json.dumps(vouched(TOLD)).encode()
    for bit in range(8 * len(sound)):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = opened(json.loads(bytes(data)))
        except ValueError:
            continue
        assert {name: value for name, value in found.items() if name in TOLD}.__repr__() == repr(TOLD)


def test_a_damaged_line_of_the_log_is_refused_by_its_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(4):
        folder.metrics.append({"event": "validation", "step": step, "loss": 0.5})
    text = folder.metrics.path.read_text().replace('"step": 2, "loss": 0.5', '"step": 2, "loss": 0.6')
    folder.metrics.path.write_text(text)
    assert [record["step"] for record in JsonLines(folder.metrics.path).read()] == [0, 1, 3]
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged in line 3; .* delete those lines"):
        folder.read_metrics()


def test_a_figure_that_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    """JSON has no NaN: jq, JavaScript and other strict readers refuse the line, which Python's own does not."""
    folder, figures = RunFolder(tmp_path), {"step_s": 1.0, "data_wait": 0.0, "num_positions": 3}
    record = {"event": "step", "step": 1, "peak_memory_gib": 0.5, **figures}
    folder.metrics.append(record | {"loss": float("nan"), "grad_norm": float("inf"), "kl": 0.5})
    # As an earlier release has written it.
    earlier = json.dumps(vouched(record | {"step": 2, "loss": float("nan"), "kl": 0.5}))
    folder.metrics.path.write_text(folder.metrics.path.read_text() + earlier + "\n")
    first, second = folder.read_metrics().records
    assert (first["loss"], first["grad_norm"], first["kl"]) == (None, None, 0.5)
    assert math.isnan(second["loss"])
    folder.metrics.keep(lambda _: True)
    for line in folder.metrics.path.read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert len(folder.read_metrics().records) == 2


@pytest.mark.parametrize("name", ["x.json", "x.parquet"])
def test_a_score_that_is_not_finite_is_null(tmp_path: Path, name: str) -> None:
    save([Evaluated("student", "export", (), float("nan"), float("inf"))], tmp_path / name)
    (student,) = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert (student["ce"], student["kl"]) == (None, None)
    assert scores_in(tmp_path / "x.json") == [opened(student)]


@pytest.mark.parametrize("event", ["step", "validation"])
@pytest.mark.parametrize("value", [{}, [1.0], "0.5"])
def test_a_line_whose_figures_are_none_is_no_record(tmp_path: Path, event: str, value: object) -> None:
    """It vouches for itself, as a stranger's may; tables and curves would add these up."""
    folder = RunFolder(tmp_path)
    record = {"event": event, "step": 1, "loss": 1.0, "kl": None}
    record |= {"step_s": 1.0, "data_wait": 0.0, "num_positions": 3, "peak_memory_gib": 0.5}
    folder.metrics.append(record)
    for name in ("loss", "kl", "step_s", "tokens_per_s"):
        folder.metrics.append(record | {"step": 2, name: value})
    assert [one["step"] for one in folder.read_metrics().records] == [1]


def test_a_line_that_a_kill_has_cut_is_no_damage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.append({"event": "validation", "step": 0})
    with open(folder.metrics.path, "a") as log:
        log.write('{"event": "valid')
    assert len(folder.read_metrics().validations) == 1


def test_the_log_of_a_finished_run_must_reach_its_end(
    tmp_path: Path, distillation_tree: dict[str, Any]
) -> None:
    path = written_run(make_recipe(distillation_tree, run__name="cut", run__root=str(tmp_path)))
    results = dict.fromkeys(
        ("run", "before", "after", "answers", "cache", "times_s", "positions_per_s", "data_wait", "export")
    )
    for step, message in ((2, None), (3, "ends at step 2, and results.json says 3")):
        (path / "results.json").write_text(json.dumps(vouched(results | {"step": step})))
        if message is None:
            assert read_run(path).is_finished
        else:
            with pytest.raises(CheckpointError, match=message):
                read_run(path)


@pytest.mark.parametrize("name", ["recipe.yaml", "model/tokenizer.json"])
def test_files_that_a_run_has_written_of_itself(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    folder.model_files.mkdir()
    for one in ("recipe.yaml", "environment.json", "model/tokenizer.json"):
        (tmp_path / one).write_text("3")
    folder.require_as_written()  # nothing vouches for it yet
    folder.write_hashes()
    folder.require_as_written()
    (tmp_path / name).write_text("4")
    with pytest.raises(CheckpointError, match=f"{name} changed, or went, after .* delete hashes.json"):
        folder.require_as_written()
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} changed, or went"):
        folder.require_as_written()


def test_hashes_of_a_stranger_name_no_file_outside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.hashes.write_text(json.dumps(vouched({"sha256": {"../../etc/passwd": "0"}})))
    with pytest.raises(CheckpointError, match="changed, or went"):
        folder.require_as_written()


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "[3]", '[{"model": 3}]', '[{"model": "student"}]', "[" * 100_000]
)
def test_scores_of_another_shape_are_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"validation\.json: damaged .*train-student evaluate"):
        scores_in(tmp_path / "validation.json")


def test_predictions_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "validation.parquet"
    lines = [{"model": "student", "row": n, "question": "q", "image_sha256": "0"} for n in range(99)]
    pq.write_table(pa.Table.from_pylist(lines), path, write_page_checksum=True, compression="none")
    sound = path.read_bytes()
    for place in range(4, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 16]) + sound[place + 1 :])
        try:
            found = read_predictions(path)
        except CheckpointError:
            continue
        assert found == lines


def test_every_bit_of_a_file_of_predictions_counts(tmp_path: Path) -> None:
    """Values that a footer repeats, as statistics do, are not covered by the checksums of pages."""
    path = tmp_path / "validation.parquet"
    lines = [{"model": "student", "row": n, "question": "q", "image_sha256": "0"} for n in range(9)]
    _write(lines, [], path)
    assert read_predictions(path) == lines
    told = pq.read_table(path).schema.metadata
    pq.write_table(pa.Table.from_pylist([lines[0] | {"row": 7}, *lines[1:]], metadata=told), path)
    with pytest.raises(CheckpointError, match=r"validation\.parquet: damaged \(its digest differs"):
        read_predictions(path)


def test_the_log_of_a_finished_run_must_reach_its_last_validation(
    tmp_path: Path, distillation_tree: dict[str, Any]
) -> None:
    path = written_run(make_recipe(distillation_tree, run__name="cut", run__root=str(tmp_path)))
    folder = RunFolder(path)
    names = ("run", "before", "answers", "cache", "times_s", "positions_per_s", "data_wait", "export")
    results = dict.fromkeys(names) | {"step": 2, "after": {"loss": 1.0}}
    folder.results.write_text(json.dumps(vouched(results)))
    folder.metrics.append({"event": "validation", "step": 0, "loss": 2.0})
    with pytest.raises(CheckpointError, match=r"ends at step 0, and results\.json says 2; the log was cut"):
        read_run(path)
    folder.metrics.append({"event": "validation", "step": 2, "loss": 1.0})
    assert read_run(path).last_validation["step"] == 2


def test_the_log_of_a_run_must_reach_its_newest_checkpoint(
    tmp_path: Path, distillation_tree: dict[str, Any]
) -> None:
    path = written_run(make_recipe(distillation_tree, run__name="cut", run__root=str(tmp_path)))
    facts = {"num_updates": 2, "num_ranks": 1, "identity": {}, "validation_loss": None, "sha256": {"x": "0"}}
    for step, message in ((2, None), (3, "ends at step 2, and its newest checkpoint says 3")):
        checkpoint = path / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "facts.json").write_text(json.dumps(vouched(facts | {"step": step})))
        if message is None:
            assert not read_run(path).is_finished
        else:
            with pytest.raises(CheckpointError, match=message):
                read_run(path)
