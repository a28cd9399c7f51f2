"""An export replaces an export, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from stage2_runs import make_recipe, run_alone

from shared.errors import RecipeError
from stage2_student.__main__ import commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> Path:
    settings = {"name": "run", "root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0}
    recipe = make_recipe(distillation_tree | {"run": settings}, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    return recipe.run.path


def export(run: Path, *options: str) -> Result:
    return CliRunner().invoke(commands, ["export", str(run), *options], standalone_mode=False)


def test_it_says_where_it_came_from(run: Path) -> None:
    facts = json.loads((run / "export" / "teachonce.json").read_text())
    assert (facts["step"], facts["recipe"]["run"]["name"]) == (1, "run")
    assert facts["torch"]


def test_a_new_folder_an_empty_one_and_an_earlier_export_are_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        assert export(run, "--out", str(place)).return_value == 0
        assert (place / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_what_is_no_export_is_not_replaced(
    run: Path, tmp_path: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "texts", tmp_path / "file", run, student_folder, Path(".")):
        found = export(run, "--out", str(place))
        assert isinstance(found.exception, RecipeError), place
        assert "no export of a run" in str(found.exception)
    assert (tmp_path / "texts" / "thesis.txt").read_text() == "years of work"
    assert (run / "checkpoints").exists()


def test_two_choices_of_a_checkpoint(run: Path) -> None:
    assert "give one of them" in str(export(run, "--step", "1", "--best").exception)
