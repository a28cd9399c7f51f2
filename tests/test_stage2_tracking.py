"""Trackers show what metrics.jsonl says, and never end a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from stage2_runs import make_recipe, records, run_alone

from shared.errors import RecipeError
from shared.recipes import Recipe, RunConfig
from stage2_student.runs.tracking import Trackers, require_trackers


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 4, "microbatch_size": 4, "max_steps": 2},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0, "export": False},
    }


def scalars(recipe: Recipe) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(recipe.run.path / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]
    }


def test_tensorboard_shows_every_step_once_across_a_resume(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, run__trackers=["tensorboard"], run__checkpoint_every=1)
    run_alone(recipe)
    longer = make_recipe(tree, run__trackers=["tensorboard"], optimization__max_steps=4)
    run_alone(longer, resume=True)

    shown = scalars(longer)
    for name in ("loss", "ce_loss", "grad_norm", "learning_rate", "data_wait", "peak_memory_gib"):
        logged = [(r["step"], r[name]) for r in records(longer) if r["event"] == "step"]
        assert [step for step, _ in shown[f"step/{name}"]] == [1, 2, 3, 4]
        assert [value for _, value in shown[f"step/{name}"]] == pytest.approx([v for _, v in logged])
    assert {step for step, _ in shown["validation/loss"]} == {0, 2, 4}
    assert "step/kd_loss" not in shown  # plain fine-tuning has none


def test_wandb_writes_a_run_without_a_network(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = make_recipe(tree, run__trackers=["wandb"])
    assert run_alone(recipe) == 0
    run_id = (recipe.run.path / "wandb_id").read_text()
    assert list((recipe.run.path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_before_the_run(
    name: str, tree: dict[str, Any], hide: Callable[[str], None]
) -> None:
    require_trackers(RunConfig(name="run", trackers=("tensorboard", "wandb")))
    hide(name)
    recipe = make_recipe(tree, run__trackers=[name])
    with pytest.raises(RecipeError, match=rf"{name} is not installed.*teachonce\[tracking\]"):
        run_alone(recipe)
    assert not recipe.run.path.exists()


class Down:
    """A service that takes one record and is gone."""

    def __init__(self) -> None:
        self.num_logged = 0

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.num_logged += 1
        if self.num_logged > 1:
            raise ConnectionError("refused")

    def close(self) -> None:
        raise AssertionError("it has been left out")


def test_a_tracker_that_fails_is_reported_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    down = Down()
    trackers = Trackers({"down": down})
    for step in range(4):
        trackers.log({"event": "step", "step": step, "loss": 1.0, "kd_loss": None, "updated": True})
    trackers.close()
    assert down.num_logged == 2
    assert capsys.readouterr().out.count("tracker down failed") == 1
