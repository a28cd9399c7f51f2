"""Rows that are spoilt, mended, left out or added in the middle of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from samples import encoded_picture
from stage2_runs import make_recipe, on_ranks, records, run_alone, step_records

from shared.data.rows import Example
from shared.dealing import Limits
from shared.errors import CheckpointError, DataError
from shared.recipes import Recipe, recipe_text
from shared.runtime import distributed
from shared.shard_order import ShardLayout
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.__main__ import commands
from stage2_student.train import train
from stage2_student.training.order import StepShape, step_examples
from stage2_student.training.trainer import Trainer

SEED = 42
SHAPE = StepShape(num_examples=12, global_batch_size=4, limits=Limits(examples=2), seed=SEED)
FIRST, SECOND, LAST = (step_examples(step, SHAPE).tolist() for step in range(3))
NO_PICTURE = {"bytes": b"no picture", "path": None}


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Plain fine-tuning for one epoch of three steps, on a copy of the data."""
    shutil.copytree(vqa_folder, tmp_path / "data")
    return {
        "data": {"source": str(tmp_path / "data"), "max_answer_tokens": 64},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 2,
            "num_epochs": 1.0,
            "learning_rate": 1e-2,
        },
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False},
    }


def change_row(data: Path, row: int, *, name: str = "train", **values: Any) -> None:
    """Rewrites one row of a split."""
    path = data / f"{name}-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def picture(seed: int) -> dict[str, Any]:
    return {"bytes": encoded_picture(seed), "path": None}


def go_on(recipe: Recipe, *, accept: bool = True) -> int:
    with distributed(device="cpu") as world:
        return train(recipe, world, resume=True, accept_data_change=accept)


def spoilt_in_the_last_step(tree: dict[str, Any], data: Path) -> Recipe:
    """A run that has ended with an error after two of three steps."""
    change_row(data, LAST[0], image_id=NO_PICTURE)
    recipe = make_recipe(tree)
    with pytest.raises(DataError, match=f"row {LAST[0]}"):
        run_alone(recipe)
    assert (recipe.run.path / "checkpoints" / "step-000002").exists()
    return recipe


def test_a_picture_that_was_spoilt_is_mended_and_the_run_goes_on(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = spoilt_in_the_last_step(tree, tmp_path / "data")
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    with pytest.raises(CheckpointError, match=r"(?s)data\.train: the run has .*--accept-data-change"):
        go_on(recipe, accept=False)
    capsys.readouterr()
    assert go_on(recipe) == 0
    told = capsys.readouterr().out
    assert "data change: data.train: 12 rows before, 12 now" in told
    assert f"other content, 1 row(s):\n  - {recipe.data.source}, split train, row {LAST[0]}" in told
    assert [record["step"] for record in step_records(recipe)] == [1, 2, 3]
    (change,) = [record for record in records(recipe) if record["event"] == "data_change"]
    assert change["step"] == 2
    assert go_on(recipe, accept=False) == 0  # finished, and of these data


def test_a_row_that_only_finished_steps_have_used_is_not_changed(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = spoilt_in_the_last_step(tree, tmp_path / "data")
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    change_row(tmp_path / "data", FIRST[1], answer="another answer")
    with pytest.raises(CheckpointError, match=rf"(?s)1 row\(s\) have changed.*row {FIRST[1]}\b"):
        go_on(recipe)
    longer = make_recipe(tree, optimization__num_epochs=2.0)
    assert go_on(longer) == 0  # it is used again


def test_a_row_is_left_out_another_added_and_validation_changes(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt_in_the_last_step(tree, tmp_path / "data")
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"question": "New?"}], schema=table.schema), path)
    change_row(tmp_path / "data", 1, name="validation", answer="other")
    recipe = make_recipe(tree, data__max_dropped=1, optimization__num_epochs=2.0)
    assert go_on(recipe) == 0
    told = capsys.readouterr().out
    assert "data change: data.train: 12 rows before, 12 now" in told
    assert f"left out, 1 row(s):\n  - {recipe.data.source}, split train, row {LAST[0]}" in told
    assert f"new, 1 row(s):\n  - {recipe.data.source}, split train, row 12" in told
    assert "data change: the order of what is left is drawn anew over these rows" in told
    assert "data change: data.validation: 4 rows before, 4 now" in told


def test_a_recipe_that_differs_too_is_refused_all_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    spoilt_in_the_last_step(tree, tmp_path / "data")
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    with pytest.raises(CheckpointError, match=r"recipe\.optimization\.learning_rate"):
        go_on(make_recipe(tree, optimization__learning_rate=0.5))


def test_rows_that_were_not_kept_cannot_be_compared(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = spoilt_in_the_last_step(tree, tmp_path / "data")
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    kept = sorted(recipe.run.path.glob("rows-*.bin"))
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"its rows of data\.train were not kept"):
        go_on(recipe)


def test_two_ranks_and_the_command_line(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = spoilt_in_the_last_step(tree, tmp_path / "data")
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    copied = make_recipe(tree, run__name="copy")
    shutil.copytree(recipe.run.path, copied.run.path)

    def resumed(world: Any) -> int:
        return train(recipe, world, resume=True, accept_data_change=True)

    assert on_ranks(2, resumed) == [0, 0]
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(copied))
    alone = CliRunner().invoke(commands, ["run", str(file), "--accept-data-change"])
    assert "goes with --resume" in alone.output
    done = CliRunner().invoke(
        commands, ["run", str(file), "--resume", "--accept-data-change"], standalone_mode=False
    )
    assert done.return_value == 0, done.output
    assert json.loads((copied.run.path / "results.json").read_text())["step"] == 3


@pytest.fixture
def in_files(tree: dict[str, Any], tmp_path: Path, examples: list[Example]) -> dict[str, Any]:
    """The same with a file for each picture, so that one can be spoilt while a run is at work."""
    (tmp_path / "files").mkdir()
    for split, rows in (("train", examples), ("validation", examples[:4])):
        lines = []
        for row in rows:
            (tmp_path / "files" / f"{split}-{row.index}.png").write_bytes(row.images[0])
            line = {"image_id": f"{split}-{row.index}.png", "question": row.question, "answer": row.answer}
            lines.append(json.dumps(line))
        (tmp_path / "files" / f"{split}.jsonl").write_text("\n".join(lines))
    columns = {"kind": None, "case": None}
    data = {"source": str(tmp_path / "files"), "max_answer_tokens": 64, "columns": columns}
    return tree | {"data": data}


def spoil_after(step: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step ends."""
    whole = Trainer._one_step

    def one_step(self: Trainer, *arguments: Any) -> None:
        whole(self, *arguments)
        if self.step == step:
            for path in paths:
                path.write_bytes(b"no picture")
            self.world.barrier()

    monkeypatch.setattr(Trainer, "_one_step", one_step)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_picture_that_is_spoilt_on_the_way_is_left_out_where_it_may_be(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    spoil_after(1, [tmp_path / "files" / f"train-{LAST[0]}.png"], monkeypatch)
    recipe = make_recipe(in_files, data__max_dropped=1, optimization__num_epochs=2.0)
    assert on_ranks(num_ranks, lambda world: train(recipe, world, resume=False)) == [0] * num_ranks
    (told,) = [record for record in records(recipe) if record["event"] == "dropped"]
    assert (told["split"], told["step"]) == ("train", 2)
    assert f"row {LAST[0]}" in told["reasons"][0]
    assert told["reasons"] == json.loads((recipe.run.path / "results.json").read_text())["dropped_rows"]
    assert len(step_records(recipe)) == 6


def test_a_validation_row_that_is_left_out_on_the_way_is_not_asked_about(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_after(1, [tmp_path / "files" / "validation-1.png"], monkeypatch)
    evaluation = {"max_examples": 4, "max_new_tokens": 2, "shuffled_pictures": True, "baseline": None}
    recipe = make_recipe(in_files | {"evaluation": evaluation}, data__max_dropped=1, run__export=True)
    assert run_alone(recipe) == 0
    results = json.loads((recipe.run.path / "results.json").read_text())
    assert results["unanswered"] is None
    assert results["answers"]["num_examples"] == results["shuffled_pictures"]["num_examples"] == 3
    (reason,) = results["dropped_rows"]
    assert "split validation, row 1" in reason


def test_a_row_that_was_left_out_on_the_way_counts_once_after_a_resume(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survey of the next start finds it, and the log has it."""
    spoil_after(1, [tmp_path / "files" / "validation-1.png"], monkeypatch)
    settings = {"data__max_dropped": 1, "optimization__schedule": "constant"}
    assert run_alone(make_recipe(in_files, **settings)) == 0
    monkeypatch.undo()
    spoil_after(4, [tmp_path / "files" / "validation-2.png"], monkeypatch)
    longer = make_recipe(in_files, **settings | {"data__max_dropped": 2}, optimization__num_epochs=2.0)
    assert go_on(longer) == 0
    rows = [reason.split(", row ")[1][0] for reason in dropped_rows(longer)]
    assert rows == ["1", "2"]


def dropped_rows(recipe: Recipe) -> list[str]:
    found: list[str] = json.loads((recipe.run.path / "results.json").read_text())["dropped_rows"]
    return found


def test_a_step_without_any_row_left_is_no_failure(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_after(1, [tmp_path / "files" / f"train-{row}.png" for row in LAST], monkeypatch)
    recipe = make_recipe(in_files, data__max_dropped=4)
    assert on_ranks(2, lambda world: train(recipe, world, resume=False)) == [0, 0]
    last = step_records(recipe)[-1]
    assert (last["step"], last["num_positions"], last["loss"]) == (3, 0, 0.0)


@pytest.mark.parametrize(("name", "rows"), [("train", LAST[:2]), ("validation", [0, 1])])
def test_one_too_many_ends_the_run_and_what_was_trained_is_kept(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: list[int]
) -> None:
    spoil_after(2, [tmp_path / "files" / f"{name}-{row}.png" for row in rows], monkeypatch)
    recipe = make_recipe(in_files, data__max_dropped=1, run__validate_every=1)
    with pytest.raises(DataError, match=r"That makes 2 left out, data\.max_dropped allows 1"):
        on_ranks(2, lambda world: train(recipe, world, resume=False))
    assert (recipe.run.path / "checkpoints" / "step-000002").exists()


@pytest.mark.parametrize("step", [2, 3])
def test_a_validation_row_that_may_not_be_left_out_costs_no_step(
    in_files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = tmp_path / "files" / "validation-1.png"
    whole = path.read_bytes()
    spoil_after(step, [path], monkeypatch)
    recipe = make_recipe(in_files, run__validate_every=1)
    with pytest.raises(DataError, match="row 1"):
        run_alone(recipe)
    monkeypatch.undo()
    path.write_bytes(whole)
    assert go_on(recipe, accept=False) == 0
    assert [record["step"] for record in step_records(recipe)] == [1, 2, 3]
    results = json.loads((recipe.run.path / "results.json").read_text())
    assert results["after"]["ce_loss"] > 0  # the last step is validated, now that it can be
    assert results["best_step"] is not None


def test_a_cache_that_has_grown_by_the_mended_row_is_the_same_cache(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree |= {
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "loss": {"kd_ratio": 0.5},
    }
    begun = make_recipe(tree, optimization__num_epochs=2 / 3, optimization__schedule="constant")
    recipe = make_recipe(tree, optimization__schedule="constant")
    captured(begun)
    assert run_alone(begun) == 0
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    captured(recipe)
    with pytest.raises(CheckpointError, match=r"(?s)cache\.manifest: .*data\.train: .*--accept-data-change"):
        go_on(recipe, accept=False)
    assert go_on(recipe) == 0
    assert f"split train, row {LAST[0]}" in capsys.readouterr().out
    assert len(step_records(recipe)) == 3


def test_rows_that_come_are_told_by_the_order_that_follows_the_shards(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path
) -> None:
    """A cache that was captured anew has its rows in the same shards, and so in the same order."""
    tree |= {
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"num_workers": 0, "examples_per_shard": 2, "shuffle_window": 2},
        "loss": {"kd_ratio": 0.5},
    }
    shape = replace(SHAPE, layout=ShardLayout.of(np.arange(12) // 2), window=2)
    first, last = (set(step_examples(step, shape).tolist()) for step in (0, 2))
    used, unused = min(first & {*LAST}), min(last - {*LAST})
    begun = make_recipe(tree, cache__path=str(tmp_path / "cache"), optimization__num_epochs=2 / 3)
    captured(begun)
    assert run_alone(begun) == 0
    for row in (used, unused):
        change_row(tmp_path / "data", row, answer="another answer")
    mended = make_recipe(tree, cache__path=str(tmp_path / "new"))
    captured(mended)
    with pytest.raises(CheckpointError, match=rf"(?s)1 row\(s\) have changed.*row {used}\b"):
        go_on(mended)


def test_a_cache_of_other_targets_is_another_run(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path
) -> None:
    tree |= {
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "loss": {"kd_ratio": 0.5},
    }
    begun = make_recipe(tree, optimization__num_epochs=2 / 3)
    captured(begun)
    assert run_alone(begun) == 0
    change_row(tmp_path / "data", LAST[0], image_id=picture(77))
    other = make_recipe(tree, cache__path=str(tmp_path / "other"), cache__seed=5)
    captured(other)
    with pytest.raises(CheckpointError, match="the cache has other targets"):
        go_on(other)


def captured(recipe: Recipe) -> None:
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0


def test_a_cache_that_others_have_added_to_is_the_same_cache(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree |= {
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0, "splits": ["train"]},
        "loss": {"kd_ratio": 0.5},
    }
    tree["data"]["splits"] = {"train": "train", "validation": None}
    begun = make_recipe(tree, data__limit=8, optimization__num_epochs=0.5, optimization__schedule="constant")
    recipe = make_recipe(tree, data__limit=8, optimization__schedule="constant")
    captured(begun)
    assert run_alone(begun) == 0
    captured(make_recipe(tree))  # another recipe, of all rows
    capsys.readouterr()
    assert go_on(recipe, accept=False) == 0
    assert (
        "other examples are in it than before; its teacher and targets are the same"
        in capsys.readouterr().out
    )
    tree["cache"] |= {"path": str(tmp_path / "other"), "seed": 5}
    other = make_recipe(tree, data__limit=8, optimization__schedule="constant")
    captured(other)
    with pytest.raises(CheckpointError, match="the cache has other targets"):
        go_on(other)


def test_another_choice_of_answers_is_no_mended_row(
    tree: dict[str, Any], tmp_path: Path, mixed_folder: Path
) -> None:
    rows = [json.loads(line) for line in (mixed_folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    part["image"] = str(mixed_folder / part["image"])
        row["messages"] += [row["messages"][0], {"role": "assistant", "content": "CT"}]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"] |= {"source": str(source), "splits": {"train": "train", "validation": None}}
    assert run_alone(make_recipe(tree, optimization__num_epochs=1 / 3)) == 0
    last = make_recipe(tree, data__train_on="last")
    for accept in (False, True):
        with pytest.raises(
            CheckpointError, match=r"data\.train_on: the run has 'all', now it is 'last'"
        ) as raised:
            go_on(last, accept=accept)
        assert "Give the settings back, or another run.name" in str(raised.value)
