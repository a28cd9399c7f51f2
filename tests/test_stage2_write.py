"""``train-student write``: a checkpoint answers, and its answers are a data set like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from stage2_runs import make_recipe, on_ranks, run_alone
from test_write import ids_of, rows_of

from shared.answering import Refused, answer
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import CheckpointError, RecipeError
from shared.models.vlm import load_vlm
from shared.models.weights import weight_fingerprint
from shared.stopping import StopRequest
from stage2_student.__main__ import commands
from stage2_student.runs.run_folder import RunFolder
from stage2_student.write import write

SMALL = ("--set", "write.max_new_tokens=6", "--set", "write.num_workers=0", "--set", "write.splits=train")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {
        "run": {
            "name": "run",
            "root": str(tmp_path_factory.mktemp("runs")),
            "num_workers": 0,
            "checkpoint_every": 2,
        }
    }


@pytest.fixture(scope="module")
def run(tree: dict[str, Any]) -> Path:
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    return recipe.run.path


def command(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["write", *arguments, *SMALL], standalone_mode=False)


def test_the_newest_checkpoint_answers(run: Path, tree: dict[str, Any]) -> None:
    shown = command(str(run))
    assert shown.return_value == 0, shown.output
    folder = run / "written" / "step-000004"
    assert f"{folder}: 12 answers" in shown.output
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "README.md",
        "train-00000-of-00001.parquet",
        "written.json",
    ]
    # As the export answers, which is the same checkpoint.
    model = load_vlm(str(run / "export"), revision=None, dtype=torch.float32, attn_implementation=None)
    processor = open_processor(str(run / "export"), make_recipe(tree).data)
    refused = Refused(
        processor.written.refused - {processor.end_of_turn}, num_token_ids=processor.num_token_ids
    )
    for prompt, row in zip(open_split(make_recipe(tree).data, "train"), rows_of(folder), strict=True):
        (said,) = answer(
            model, processor, [processor.encode_prompt(prompt)], max_new_tokens=6, choose=[refused]
        )
        assert (row["answer_ids"], row["answer_end"]) == (said.ids, said.is_whole)
    told = json.loads(row["written_by"])
    assert (told["role"], told["run"], told["step"]) == ("student", str(run), 4)
    assert told["weights"] == weight_fingerprint(model)


def test_any_checkpoint_and_any_folder(run: Path, tmp_path: Path) -> None:
    shown = command(str(run), "--step", "2", "--out", str(tmp_path / "two"))
    assert shown.return_value == 0, shown.output
    assert json.loads(rows_of(tmp_path / "two")[0]["written_by"])["step"] == 2
    again = command(str(run), "--step", "2", "--out", str(tmp_path / "two"))
    assert "holds all answers; nothing to write" in again.output
    other = command(str(run), "--step", "4", "--out", str(tmp_path / "two"))
    assert isinstance(other.exception, RecipeError)
    assert "writer.weights" in str(other.exception)
    best = command(str(run), "--best", "--out", str(tmp_path / "best"))
    assert best.return_value == 0, best.output
    nowhere = command(str(run), "--step", "3")
    assert isinstance(nowhere.exception, CheckpointError)
    assert "no checkpoint of step 3; there are: 2, 4" in str(nowhere.exception)
    assert not (run / "written" / "step-000003").exists()


def test_a_student_of_adapters_on_two_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    writing = {"max_new_tokens": 6, "num_workers": 0, "prompts_per_file": 4, "temperature": 1.0}
    recipe = make_recipe(
        tree | {"write": writing},
        student__lora={"rank": 4},
        run__name="lora",
        run__root=str(tmp_path),
    )
    assert run_alone(recipe) == 0
    folder = RunFolder(recipe.run.path)
    checkpoint = folder.checkpoints.latest()
    assert checkpoint is not None

    def answered(num_ranks: int, out: Path) -> list[Any]:
        done = on_ranks(
            num_ranks, lambda world: write(folder, recipe, checkpoint, world, StopRequest(), out=out)
        )
        assert done == [0] * num_ranks
        return ids_of(out)

    assert answered(2, tmp_path / "two") == answered(1, tmp_path / "one")
    assert not list((tmp_path / "two").glob(".student*"))
    assert not (recipe.run.path / "written").exists()
