"""``train-student``: what its commands print, and the statuses they leave with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from stage2_runs import files_of, make_recipe, run_alone, state_of, written_run
from transformers import AutoModelForImageTextToText

from shared.errors import CheckpointError, RecipeError
from shared.small_models import save_reference_config
from stage2_student.__main__ import commands
from stage2_student.check import check_recipe
from stage2_student.evaluation.answer_metrics import normalize
from stage2_student.runs.run_folder import RunFolder


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {
        "run": {
            "name": "run",
            "root": str(tmp_path / "runs"),
            "num_workers": 0,
            "checkpoint_every": 2,
            "validate_every": 2,
        },
        "evaluation": {"max_examples": 4, "max_new_tokens": 4, "batch_size": 3},
    }


def command(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments), standalone_mode=False)


def written(tree: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_run_leaves_everything_that_a_reader_needs(tree: dict[str, Any], tmp_path: Path) -> None:
    shown = command("run", written(tree, tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "short answers right" in shown.output
    run = tmp_path / "runs" / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 4
    assert results["after"]["ce_loss"] < results["before"]["ce_loss"]
    assert results["cache"]["bytes_per_position"] > 0
    assert results["answers"]["num_examples"] == 4
    answers = pq.read_table(run / "evaluation" / "validation.parquet").to_pylist()
    assert {one["row"] for one in answers} == {0, 1, 2, 3}
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optimization"]["betas"] == [0.9, 0.95]
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {"step-000002", "step-000004", "latest", "best"}


def test_an_override_that_is_wrong_is_one_message_with_its_status(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ["run", written(tree, tmp_path), "--set", "optimization.learning_rte=1"]
    done = subprocess.run(
        [sys.executable, "-m", "stage2_student", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == RecipeError.exit_status
    assert "unknown key; did you mean 'learning_rate'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("options", "step"), [([], 4), (["--step", "2"], 2)])
def test_any_checkpoint_can_be_exported_at_any_time_by_one_process(
    tree: dict[str, Any], tmp_path: Path, options: list[str], step: int
) -> None:
    recipe = make_recipe(tree, run__export=False)
    run_alone(recipe)
    shown = command("export", str(recipe.run.path), "--out", str(tmp_path / "out"), *options)
    assert shown.exit_code == 0, shown.output
    trained = state_of(recipe, step)
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, trained[f"model.{name}"]) for name, p in exported.named_parameters())


def test_a_folder_without_a_checkpoint_cannot_be_exported(tmp_path: Path) -> None:
    shown = command("export", str(tmp_path))
    assert isinstance(shown.exception, CheckpointError)


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make_recipe(tree, run__export=False, optimization__learning_rate=0.02)
    run_alone(recipe)
    found = RunFolder(recipe.run.path).checkpoints.all()
    losses = {one.facts.step: one.facts.validation_loss for one in found}
    best = RunFolder(recipe.run.path).checkpoints.best()
    assert best is not None
    assert losses[best.facts.step] == min(loss for loss in losses.values() if loss is not None)


def test_evaluate_answers_with_a_folder_of_any_model(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path
) -> None:
    shown = command("evaluate", written(tree, tmp_path), "--model", str(student_folder))
    assert shown.exit_code == 0, shown.output
    assert "right, short" in shown.output


def test_a_comparison_is_written_over_an_earlier_one_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    run = written_run(make_recipe(tree))
    results, found = run / "results.json", tmp_path / "found.json"
    results.write_text('{"step": 4}')
    found.touch()
    with pytest.raises(click.UsageError, match=r"results\.json: a file with something else is there"):
        commands(["compare", str(run), "--json", str(results)], standalone_mode=False)
    assert results.read_text() == '{"step": 4}'
    results.unlink()
    for _ in range(2):
        assert command("compare", str(run), "--json", str(found)).exit_code == 0
        assert {"runs", "caches"} == json.loads(found.read_text()).keys()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("results.json", ["--no-answers"], r"results\.json: a file with something else"),
        (
            "results.parquet",
            [],
            r"results\.json: a file with something else",
        ),  # the scores go beside the answers
        ("rows.parquet", [], r"rows\.parquet: a file with something else"),
        ("evaluation/validation.parquet", [], "a run keeps its own answers there"),
        ("evaluation/new.json", ["--no-answers"], "a run keeps its own answers there"),
    ],
)
def test_answers_are_written_over_earlier_ones_alone(
    tree: dict[str, Any], vqa_folder: Path, out: str, options: list[str], message: str
) -> None:
    run = written_run(make_recipe(tree))
    (run / "evaluation").mkdir()
    (run / "results.json").write_text('{"step": 4}')
    shutil.copy(next(vqa_folder.glob("train*.parquet")), run / "rows.parquet")
    before = files_of(run)
    with pytest.raises(click.UsageError, match=message):
        commands(["evaluate", str(run), "--out", str(run / out), *options], standalone_mode=False)
    assert files_of(run) == before


def test_answers_are_compared_without_case_punctuation_and_spaces() -> None:
    assert normalize(" A  Mass, of 3\u202fcm. ") == normalize("a mass of 3 cm")
    assert normalize("left") != normalize("right")


def test_check_counts_what_a_run_will_do(tree: dict[str, Any], tmp_path: Path) -> None:
    shown = command("check", written(tree, tmp_path), "--nproc", "2")
    assert shown.exit_code == 0, shown.output
    for line in (
        "12 examples",
        "4 examples: 1.0 microbatch(es) on each of 2 rank(s); padding ",
        "no problem found",
    ):
        assert line in shown.output
    positions = [
        json.loads(line)["num_positions"]
        for line in _records_of_an_epoch(make_recipe(tree, optimization__max_steps=3)).splitlines()
        if '"step"' in line and '"event": "step"' in line
    ]
    assert f"{sum(positions)} answer positions" in shown.output


def _records_of_an_epoch(recipe: Any) -> str:
    run_alone(recipe)
    return str((recipe.run.path / "metrics.jsonl").read_text())


def test_check_shows_every_problem_at_once_with_a_status(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] = {"source": str(tmp_path), "max_answer_tokens": 64}
    tree["student"] = {"model": str(tmp_path / "nowhere")}
    tree["parallel"] = {"dp_replicate": 2}
    shown = command("check", written(tree, tmp_path), "--nproc", "3")
    assert shown.return_value == RecipeError.exit_status
    for problem in ("model", "nowhere", "does not divide 3 ranks", "3 problem(s)"):
        assert problem in shown.output


@pytest.mark.parametrize(("size", "billions"), [("4B", 4.54), ("9B", 9.41)])
def test_check_knows_the_full_size_without_weights(
    tree: dict[str, Any], tmp_path: Path, size: Any, billions: float
) -> None:
    tree["student"] = {"model": str(save_reference_config(tmp_path / "model", size))}
    report = check_recipe(make_recipe(tree), num_ranks=8)
    facts = dict(report.facts)
    assert facts["  head"] == "248,320 ids wide"
    assert float(facts["parameters"].split(":")[0].replace(",", "")) / 1e9 == pytest.approx(billions, abs=0.3)
    gib = float(facts["memory per device"].split()[1])
    assert 5 < gib < 200
