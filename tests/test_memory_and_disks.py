"""Too little memory, a full disk, a teacher that gives no numbers: one message each, with the rows and what to do."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from stage2_runs import make_recipe, on_ranks, run_alone
from transformers import AutoTokenizer

from shared.errors import DataError, FileError, RecipeError, TrainingError
from shared.models.plans import has_plans
from shared.recipes import Recipe
from shared.runtime import World
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.runs.run_folder import RunFolder
from stage2_student.train import train
from stage2_student.training.export import choose_checkpoint, export_checkpoint

MIB = 2**20


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_folder: Path) -> dict[str, Any]:
    shutil.copytree(vqa_folder, tmp_path / "data")
    return {
        "data": {"source": str(tmp_path / "data"), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 3, "learning_rate": 1e-3},
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False},
    }


def change_row(data: Path, row: int, *, name: str = "train", **values: Any) -> None:
    path = data / f"{name}-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.fixture
def one_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all threads of a new process together: each of its own would take 64 MiB of address space."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")


def with_little_memory(function: Callable[[World], Any], world: World) -> Any:
    """300 MiB beside what the process has already, of address space: more than twice what ordinary rows take.

    For a new process: a fork of one that has run other tests has what they freed, and that is reused first.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * MIB, resource.RLIM_INFINITY))
    return function(world)


def trained(recipe: Recipe, world: World) -> int:
    return train(recipe, world, resume=False)


def captured(recipe: Recipe, world: World) -> Any:
    return capture(recipe, world, StopRequest())


@pytest.mark.usefixtures("one_arena")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_question_of_20000_words_is_named(tree: dict[str, Any], tmp_path: Path, split: str) -> None:
    change_row(tmp_path / "data", 1, name=split, question="which plane " * 10_000)
    recipe = make_recipe(tree)
    limited = partial(with_little_memory, partial(trained, recipe))
    with pytest.raises(TrainingError, match=rf"(?s)do not fit into memory.*split {split}, row 1\b.*Lower"):
        on_ranks(1, limited, new=True)


@pytest.mark.usefixtures("one_arena")
def test_a_question_of_20000_words_is_named_by_the_capture(tree: dict[str, Any], tmp_path: Path) -> None:
    change_row(tmp_path / "data", 1, question="which plane " * 10_000)
    recipe = make_recipe(tree)
    limited = partial(with_little_memory, partial(captured, recipe))
    with pytest.raises(
        TrainingError, match=r"split train, row 1: one sequence of [0-9]+ tokens does not fit"
    ):
        on_ranks(1, limited, new=True)


@pytest.mark.parametrize("num_ranks", [1, 2] if has_plans() else [1])
def test_a_teacher_that_gives_no_numbers_names_the_row(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path, num_ranks: int
) -> None:
    """Its embedding of one token is NaN, and one row has it; then all rows have."""
    broken = shutil.copytree(teacher_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(broken)("#", add_special_tokens=False)["input_ids"]
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name][token] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    change_row(tmp_path / "data", 9, question="#")
    recipe = make_recipe(tree, teacher__model=str(broken), teacher__tensor=num_ranks)
    with pytest.raises(DataError, match=r"1 row\(s\) is no distribution") as refused:
        on_ranks(num_ranks, lambda world: capture(recipe, world, StopRequest()))
    assert re.findall(r"split train, row (\d+)", str(refused.value)) == ["9"]
    for row in range(9):
        change_row(tmp_path / "data", row, question="#")
    with pytest.raises(RecipeError, match="it gives NaN or infinity for the first examples"):
        on_ranks(num_ranks, lambda world: capture(recipe, world, StopRequest()))


def test_a_full_disk_at_export_is_one_message_and_loses_nothing(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, run__export=True, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    export = recipe.run.path / "export"
    before = {path.name: path.read_bytes() for path in export.iterdir()}

    def exported(world: World) -> None:
        limit = 300_000  # bytes a file may have, and the weights have more
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        folder = RunFolder(recipe.run.path)
        export_checkpoint(folder, choose_checkpoint(folder), folder.export)

    (error,) = on_ranks(1, exported, errors=True)
    assert isinstance(error, FileError)
    assert error.exit_status == 74
    assert str(export) in str(error)
    assert "Make room" in str(error)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert not list(recipe.run.path.glob(".export*"))
    assert json.loads((export / "teachonce.json").read_text())["step"] == 1
