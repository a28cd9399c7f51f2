"""``data.written``: answers that a model wrote, learned in place of the rows' own; and which prompts it is asked."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import write_vqa_folder
from stage2_runs import make_recipe, run_alone, step_records
from test_write import rows_of, tree, written  # noqa: F401  # a fixture

from shared.cache import CacheReader
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.data.written import WRITTEN, answers_in
from shared.errors import DataError, RecipeError
from shared.recipes import WriteConfig
from shared.runtime import distributed
from shared.stopping import StopRequest
from shared.surveying import Surveyors, survey_keys
from shared.writing.card import card
from shared.writing.plan import choice
from stage1_teacher.capture import capture

SOME = {"write__prompts": 5, "write__splits": ["train"], "write__temperature": 1.0}


def laid(tree: dict[str, Any], *folders: Path, **overrides: Any) -> Any:  # noqa: F811
    names = [str(one) for one in folders]
    return make_recipe(tree, data__written=names, write__path=None, **overrides)


def test_rows_keep_their_own_answers_but_for_those_that_were_answered(tree: dict[str, Any]) -> None:  # noqa: F811
    recipe, folder = written(tree, **SOME)
    given, mixed = (open_split(one.data, "train") for one in (recipe, laid(tree, folder)))
    asked = {row["source_row"]: row for row in rows_of(folder)}
    assert (len(mixed), len(asked)) == (len(given), 5)
    assert mixed.written is not None
    assert mixed.written.num_answers == 5
    for before, now in zip(given, mixed, strict=True):
        assert now.index == before.index
        assert (now.images, now.turns[:-1], now.kind, now.case) == (
            *(before.images, before.turns[:-1], before.kind, before.case),
        )
        if now.index in asked:
            assert now.answer_ids == tuple(asked[now.index]["answer_ids"])
            assert now.written_by == asked[now.index]["written_by"]
        else:
            assert now == before
    assert open_split(laid(tree, folder).data, "validation").written is None


def test_splits_whose_names_begin_alike_or_look_like_patterns_are_kept_apart(tmp_path: Path) -> None:
    for split in ("train-dev", "train[a]"):
        pq.write_table(pa.table({"question": ["?"]}), tmp_path / f"{split}-00000-of-00001.parquet")
    (tmp_path / WRITTEN).write_text("{}")
    found = {
        split: answers_in(str(tmp_path), split) for split in ("train", "train-dev", "train[a]", "train[b]")
    }
    assert found == {"train": False, "train-dev": True, "train[a]": True, "train[b]": False}
    told = {"files": {f"{split}-00000-of-00002.parquet": "" for split in ("train", "train-dev", "train[a]")}}
    text = card(told | {"written_by": {}, "counts": {}})
    patterns = [json.loads(line.split(": ")[1]) for line in text.splitlines() if "path: " in line]
    assert [[name for name in told["files"] if fnmatch.fnmatchcase(name, one)] for one in patterns] == [
        [name] for name in told["files"]
    ]


def test_the_last_folder_counts(tree: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    _, first = written(tree, **SOME)
    _, second = written(tree, **SOME | {"write__prompts": 3}, write__path=str(tmp_path / "second"))
    rows = {row["source_row"]: row["answer_ids"] for row in rows_of(first)}
    rows |= {row["source_row"]: row["answer_ids"] for row in rows_of(second)}
    mixed = open_split(laid(tree, first, second).data, "train")
    own = {one.index: list(one.answer_ids) for one in mixed if one.answer_ids is not None}
    assert own == rows


def test_a_cache_grows_by_the_written_answers_alone_and_a_student_learns_them(
    tree: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe, folder = written(tree, **SOME)
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
        before = CacheReader(str(tmp_path / "cache")).manifest.totals.examples
        both = laid(tree, folder)
        assert capture(both, world, StopRequest()) == 0
    manifest = CacheReader(str(tmp_path / "cache")).manifest
    assert manifest.totals.examples == before + 5
    assert any("teacher" in name for source in manifest.identity.data for name in source.written_by)
    assert run_alone(both) == 0
    first, second = step_records(both)
    assert first["num_positions"] + second["num_positions"] > 0
    # What is found of the given rows is kept as theirs: without the folder everything is as before.
    assert run_alone(make_recipe(tree, run__name="given")) == 0


def test_the_survey_is_that_of_the_rows_one_by_one(
    tree: dict[str, Any],  # noqa: F811
    processor: ExampleProcessor,
    tmp_path: Path,
) -> None:
    _, folder = written(tree, **SOME)
    recipe = laid(tree, folder)
    surveyors = Surveyors(kept_at=str(tmp_path / "kept"))
    for _ in range(2):  # then from what is kept
        keyed = survey_keys(recipe.data, "train", processor, surveyors)
        assert [key.tobytes() for key in keyed.keys] == [processor.key(one) for one in keyed.split]
        assert len(keyed.written_by) == 1
    given = survey_keys(recipe.data.model_copy(update={"written": None}), "train", processor, surveyors)
    assert [key.tobytes() for key in given.keys] == [processor.key(one) for one in given.split]


def test_answers_to_other_prompts_are_refused(
    tree: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    _, folder = written(tree, **SOME)
    other = laid(tree, folder, data__system_prompt="Answer briefly.")
    processor = open_processor(other.student.model, other.data)
    with pytest.raises(
        DataError, match=r"was written to another prompt \(5 such rows\). Ask as the set was asked"
    ):
        survey_keys(other.data, "train", processor)
    few = laid(tree, folder, data__source=str(write_vqa_folder(tmp_path / "few", num_train=1)))
    with pytest.raises(
        DataError, match=r"it answers row .* has 1\. Name the set that was written for these data"
    ):
        open_split(few.data, "train")
    with pytest.raises(DataError, match="no finished set of written answers"):
        open_split(laid(tree, tmp_path / "nowhere").data, "train")


def test_a_trial_of_the_first_rows_takes_their_answers_alone(
    tree: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    _, folder = written(tree, **SOME)
    asked = sorted(row["source_row"] for row in rows_of(folder))
    whole = laid(tree, folder)
    processor = open_processor(whole.student.model, whole.data)
    all_keys = survey_keys(whole.data, "train", processor).keys
    for limit in (asked[0] + 1, asked[3]):  # one and three of them
        trial = laid(tree, folder, data__limit=limit)
        split = open_split(trial.data, "train")
        assert [one.index for one in split if one.written_by] == [row for row in asked if row < len(split)]
        keyed = survey_keys(trial.data, "train", processor)
        assert np.array_equal(keyed.keys, all_keys[: len(split)])
        assert len(keyed.written_by) == 1
    with distributed(device="cpu") as world:
        assert capture(trial, world, StopRequest()) == 0
        assert capture(whole, world, StopRequest()) == 0
    assert run_alone(trial) == 0


def test_parts_of_the_prompts_cover_all_of_them_once() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (10, 16), np.uint8)
    keys[7] = keys[2]  # nine different ones

    def part(number: int, seed: int = 0, prompts: int = 3) -> list[int]:
        return choice(keys, WriteConfig(prompts=prompts, part=number, seed=seed)).tolist()

    assert sorted(part(0) + part(1) + part(2)) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert part(3) == part(0) == sorted(part(0))
    assert part(0, seed=1) != part(0)
    assert part(5, prompts=100) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    # Which prompts are chosen depends on their keys, and not on their order.
    turned = choice(keys[::-1].copy(), WriteConfig(prompts=3))
    assert sorted(9 - turned) == [7 if row == 2 else row for row in part(0)] or sorted(9 - turned) == part(0)


def test_a_part_needs_its_size(tree: dict[str, Any]) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match="part 1 without prompts"):
        make_recipe(tree, write__part=1)
