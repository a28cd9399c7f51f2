"""The way from rows to microbatches: what is compared, and how its failures reach the user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from changed_models import with_text_config
from stage2_runs import make_recipe, on_ranks, records, run_alone, run_ranks, step_records, teacher_of

from shared.cache import CacheReader
from shared.data.processing import ExampleProcessor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, DataError, TrainingError
from shared.recipes import DataConfig
from stage2_student.training.agreement import in_agreement
from stage2_student.training.feed import Microbatch, MicrobatchSource, feed
from stage2_student.training.order import Slot

STEPS = [[Slot(0, (0, 1)), Slot(0, (2,))], [Slot(1, (3, 4)), Slot(1, (0,), counts=False)]]


@pytest.fixture
def source(data_config: DataConfig, processor: ExampleProcessor, teacher_cache: Path) -> MicrobatchSource:
    split = open_split(data_config, "train")
    return MicrobatchSource(split, np.arange(len(split)), processor, CacheReader(str(teacher_cache)))


def taken(source: MicrobatchSource, steps: list[list[Slot]], *, num_workers: int) -> list[list[Microbatch]]:
    return [step for step, _ in feed(source, steps, num_workers=num_workers, pin_memory=False)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_microbatches_come_in_order_with_targets_of_their_own_positions(
    source: MicrobatchSource, num_workers: int
) -> None:
    steps = taken(source, STEPS, num_workers=num_workers)
    assert [[m.slot for m in step] for step in steps] == STEPS
    for step in steps:
        for microbatch in step:
            assert microbatch.targets is not None
            assert (
                microbatch.targets.num_positions == microbatch.num_positions == len(microbatch.position_index)
            )
            own = [source.processor.encode(source.split[row]).answer_ids for row in microbatch.slot.examples]
            wanted = torch.cat(own).tolist() if microbatch.slot.counts else []
            assert microbatch.labels.tolist() == wanted


def test_rows_are_those_of_the_survey(source: MicrobatchSource) -> None:
    shifted = MicrobatchSource(source.split, np.arange(5, 10), source.processor, source.cache)
    ((microbatch,),) = taken(shifted, [[Slot(0, (2,))]], num_workers=0)
    assert microbatch.labels.tolist() == source.processor.encode(source.split[7]).answer_ids.tolist()


class OtherAnswers(CacheReader):
    """A cache whose row for every key holds another answer: the third token is off by one."""

    def rows(self, keys: Any, *, names: Any = ()) -> Any:
        found = super().rows(keys, names=names)
        changed = [row.answer_ids.copy() for row in found]
        for ids in changed:
            ids[2] += 1
        return [replace(row, answer_ids=ids) for row, ids in zip(found, changed, strict=True)]


def test_an_answer_that_differs_from_the_student_s_is_refused_by_row(
    source: MicrobatchSource, teacher_cache: Path
) -> None:
    wrong = MicrobatchSource(source.split, source.rows, source.processor, OtherAnswers(str(teacher_cache)))
    with pytest.raises(CacheMismatchError, match=r"split train, row 3: .*differ from token 2 on"):
        taken(wrong, [[Slot(0, (3,))]], num_workers=1)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the loader's, once it is told
def test_a_worker_that_is_killed_ends_the_feed(source: MicrobatchSource) -> None:
    class Killed(MicrobatchSource):
        def microbatch(self, slot: Slot, rows: list[int]) -> Microbatch:
            if slot.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().microbatch(slot, rows)

    killed = Killed(source.split, source.rows, source.processor, source.cache)
    steps = [[Slot(step, (0,))] for step in range(8)]
    with pytest.raises(TrainingError, match=r"data-loader worker died.*run\.num_workers"):
        taken(killed, steps, num_workers=1)


def test_an_unforeseen_error_keeps_its_traceback_and_names_the_row(source: MicrobatchSource) -> None:
    class Broken(MicrobatchSource):
        def microbatch(self, slot: Slot, rows: list[int]) -> Microbatch:
            raise ZeroDivisionError("a bug")

    broken = Broken(source.split, source.rows, source.processor, source.cache)
    with pytest.raises(ZeroDivisionError, match=r"(?s)a bug.*split train, row 4"):
        taken(broken, [[Slot(0, (4,))]], num_workers=1)


def test_an_error_of_one_rank_is_raised_by_all(source: MicrobatchSource, teacher_cache: Path) -> None:
    wrong = MicrobatchSource(source.split, source.rows, source.processor, OtherAnswers(str(teacher_cache)))

    def outcome(world: Any) -> str:
        own = wrong if world.rank == 1 else source
        fed = feed(own, [[Slot(0, (world.rank,))]], num_workers=0, pin_memory=False)
        try:
            list(in_agreement(fed, world))
        except CacheMismatchError as error:
            return str(error)
        return "no error"

    first, second = on_ranks(2, outcome)
    assert "row 1" in first
    assert first == second


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_cache: Path) -> dict[str, Any]:
    data = tmp_path / "data"
    shutil.copytree(vqa_folder, data)
    return {
        "data": {"source": str(data), "max_answer_tokens": 64},
        "teacher": teacher_of(teacher_cache),
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 2},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 1, "export": False},
    }


def change_row(data: Path, row: int, **values: Any) -> None:
    """Rewrites one training row."""
    path = data / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= values
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


def test_a_row_that_is_not_in_the_cache_is_named_before_the_first_step(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    change_row(tmp_path / "data", 5, answer="another answer")
    with pytest.raises(
        CacheMismatchError, match=r"1 of 12 examples are not in it.*row 5 first.*teacher-cache"
    ):
        run_alone(make_recipe(tree))


def test_rows_longer_than_the_students_context_are_told(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = with_text_config(tree["student"]["model"], tmp_path / "short", max_position_embeddings=40)
    assert run_alone(make_recipe(tree, student__model=short, optimization__max_steps=1)) == 0
    told = re.findall(r"note: .* split (\w+): .* of student .*, 40; row \d+ has", capsys.readouterr().out)
    assert told == ["train", "validation"]


def test_an_unusable_row_stops_the_run_unless_it_may_be_dropped(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_row(tmp_path / "data", 5, answer=None)
    with pytest.raises(DataError, match=r"(?s)1 row\(s\) cannot be used.*row 5: the answer is missing"):
        run_alone(make_recipe(tree))
    recipe = make_recipe(tree, data__max_dropped=1)
    assert run_alone(recipe) == 0
    assert "row 5: the answer is missing" in (recipe.run.path / "results.json").read_text()
    printed = capsys.readouterr().out
    notice = printed.index("split train: 1 of 12 rows are left out:\n  - ")
    assert notice < printed.index("step 0 of ")
    first = json.loads((recipe.run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["splits"]["train"]["num_dropped"]) == ("data", 1)
    assert "row 5: the answer is missing" in first["splits"]["train"]["dropped"][0]


def test_a_picture_that_cannot_be_decoded_reaches_the_user_from_any_rank(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    change_row(tmp_path / "data", 5, image_id={"bytes": b"no picture", "path": None})
    plain = make_recipe(tree, loss__kd_ratio=0.0, optimization__microbatch_size=1, optimization__max_steps=3)
    with pytest.raises(DataError, match="row 5"):
        run_ranks(plain, 2)


def test_ranks_that_do_not_divide_the_global_batch_train_the_same_student(tree: dict[str, Any]) -> None:
    one, three = make_recipe(tree, run__name="one"), make_recipe(tree, run__name="three")
    assert run_alone(one) == 0
    assert run_ranks(three, 3) == [0, 0, 0]
    losses = [[record["loss"] for record in step_records(recipe)] for recipe in (one, three)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    logged = [record for record in records(three) if record["event"] == "step"]
    assert all(0 <= record["padding"] < 1 for record in logged)
    assert any(record["waiting"] > 0 for record in logged)
