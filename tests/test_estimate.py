"""An estimate from a sample against the capture it announces."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from shared.cache import CacheReader
from shared.data.collation import Batch
from shared.errors import RecipeError, TrainingError
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.reports.break_even import TeacherCosts
from shared.runtime import World, distributed
from shared.stopping import StopRequest
from stage1_teacher.__main__ import commands
from stage1_teacher.capture import capture
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage1_teacher.estimate import Times, Totals, estimate, live, show, teacher_costs


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {
            "path": str(tmp_path / "cache"),
            "policy": {"kind": "threshold", "tau": 1 / 64},
            "examples_per_shard": 4,
            "num_workers": 0,
        },
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 6, "global_batch_size": 4},
        "run": {"name": "mine"},
    }


def test_a_sample_of_everything_is_what_the_capture_then_writes(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = validate_tree(Recipe, tree, origin="test")
    with distributed(device="cpu") as world:
        found = estimate(recipe, world, num_examples=16, taus=(1 / 64, 1 / 512))
        assert not (tmp_path / "cache").exists()
        capture(recipe, world, StopRequest())
    held = CacheReader(tmp_path / "cache").manifest
    assert (found.num_examples, found.num_positions) == (held.totals.examples, held.totals.positions)
    assert found.num_shards == len(held.shards)
    own = next(size for size in found.sizes if size.is_recipe)
    assert own.policy == "threshold 1/64"
    assert own.entries_per_position == pytest.approx(held.totals.entries / held.totals.positions)
    assert own.total_bytes == pytest.approx(held.totals.bytes, rel=0.03)
    assert found.num_epochs == 2.0


def test_smaller_taus_cost_more_and_each_policy_is_measured_once(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = validate_tree(Recipe, tree, origin="test")
    with distributed(device="cpu") as world:
        found = estimate(recipe, world, num_examples=5, taus=(1 / 4, 1 / 64, 1 / 1024))
    assert found.num_sampled == 5
    assert [size.policy for size in found.sizes] == ["threshold 1/4", "threshold 1/64", "threshold 1/1024"]
    assert all(seconds > 0 for name, seconds in vars(found.times).items() if name != "unseen")
    assert found.times.unseen == 0  # there is no second pass
    assert found.times.capture > 0.5 * found.times.live
    show(found)
    assert "cache.examples_per_shard" not in capsys.readouterr().out
    sizes = tuple(replace(size, total_bytes=2**33) for size in found.sizes)
    show(replace(found, sizes=sizes))  # four of the sixteen examples in a shard
    told = r"a shard of 4 examples would take 2\.0 GiB.* Set cache\.examples_per_shard lower"
    assert re.search(told, capsys.readouterr().out)


def test_the_command_prints_a_page_or_json(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["cache"]["policy"] = {"kind": "top_k", "k": 8}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    arguments = [
        "estimate",
        str(recipe),
        "--examples",
        "4",
        "--students",
        "3",
        "--epochs",
        "2",
        "--tau",
        "0.125",
    ]
    page = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    assert page.exit_code == 0
    assert "top_k 8" in page.output
    assert "<- the recipe" in page.output
    assert "3 student(s) of 2 epoch(s)" in page.output
    assert re.search(r"the cache (pays after \d+\.\d\d epochs|never pays)", page.output)
    printed = CliRunner().invoke(commands, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(printed.stdout)
    assert {size["policy"] for size in found["sizes"]} == {"top_k 8", "threshold 1/8"}
    assert found["live_s"] == pytest.approx(6 * found["costs"]["live_epoch_s"])
    assert "break_even_epochs" in found["costs"]


def test_without_a_teacher_there_is_nothing_to_estimate(tree: dict[str, Any]) -> None:
    tree["loss"] = {"kd_ratio": 0.0}
    del tree["teacher"], tree["cache"]
    with distributed(device="cpu") as world, pytest.raises(RecipeError, match="needs a teacher and a cache"):
        estimate(validate_tree(Recipe, tree, origin="test"), world)


@pytest.mark.parametrize(("num_workers", "seconds"), [(0, 60.0), (1, 40.0), (4, 20.0)])
def test_a_capture_without_workers_reads_and_computes_in_turn(num_workers: int, seconds: float) -> None:
    """With workers it is as slow as the slower of both; without, both follow each other."""
    times = Times(live=1.0, capture=2.0, pictures=4.0, reading=3.0)
    totals = Totals(examples=10, positions=100, shards=1, training_examples=10)
    costs = teacher_costs(times, totals, capture_workers=num_workers, student_workers=0, num_ranks=1)
    assert costs == TeacherCosts(capture_s=seconds, live_epoch_s=10.0, cached_epoch_s=30.0)


def test_the_student_reads_with_workers_of_its_own(tree: dict[str, Any]) -> None:
    tree["run"]["num_workers"] = 3
    with distributed(device="cpu") as world:
        found = estimate(validate_tree(Recipe, tree, origin="test"), world, num_examples=2, taus=())
    assert found.costs.cached_epoch_s == pytest.approx(12 * found.times.reading / 3)


def test_only_the_first_rank_prints(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def second_rank() -> Iterator[World]:
        with distributed(device="cpu") as world:
            yield replace(world, rank=1)

    monkeypatch.setattr("shared.runtime.distributed", second_rank)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(
        commands, ["estimate", str(tmp_path / "recipe.yaml"), "--examples", "2"], standalone_mode=False
    )
    assert (done.return_value, done.stdout) == (0, "")


def test_a_sharded_teacher_tries_no_smaller_batch(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks would wait for ever in the batch that did not fit."""

    def load_sharded(*args: Any, **options: Any) -> Teacher:
        return replace(load_teacher(*args, **options), is_sharded=True)

    def full(teacher: Teacher, batch: Batch, chunk_size: int) -> None:
        if len(batch.inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr("stage1_teacher.estimate.load_teacher", load_sharded)
    monkeypatch.setattr("stage1_teacher.estimate.live", full)
    recipe = validate_tree(Recipe, tree, origin="test")
    with distributed(device="cpu") as world, pytest.raises(TrainingError, match="cannot try a smaller one"):
        estimate(recipe, world, num_examples=4)


def test_no_part_exceeds_its_whole(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A live teacher's pass that took longer than the whole capture was disturbed by something else."""

    def disturbed(teacher: Teacher, batch: Batch, chunk_size: int) -> None:
        live(teacher, batch, chunk_size)
        time.sleep(1)

    monkeypatch.setattr("stage1_teacher.estimate.live", disturbed)
    recipe = validate_tree(Recipe, tree, origin="test")
    with distributed(device="cpu") as world:
        found = estimate(recipe, world, num_examples=4, num_students=2, taus=())
    assert found.times.live <= found.times.capture
    cached_s = found.costs.cached_s(num_students=2, num_epochs=found.num_epochs)
    assert found.num_examples * found.times.capture <= found.costs.capture_s <= cached_s


def test_break_even_by_hand() -> None:
    costs = TeacherCosts(capture_s=600.0, live_epoch_s=500.0, cached_epoch_s=20.0)
    assert costs.break_even_epochs == 1.25
    assert costs.live_s(num_students=3, num_epochs=2) == 3000.0
    assert costs.cached_s(num_students=3, num_epochs=2) == 720.0
    assert TeacherCosts(600.0, 20.0, 20.0).break_even_epochs == math.inf


def test_a_cache_that_never_pays_is_plain_json_and_plain_words() -> None:
    pays = TeacherCosts(capture_s=600.0, live_epoch_s=500.0, cached_epoch_s=20.0)
    never = TeacherCosts(capture_s=600.0, live_epoch_s=20.0, cached_epoch_s=20.0)
    assert pays.to_json() == {
        "capture_s": 600.0,
        "live_epoch_s": 500.0,
        "cached_epoch_s": 20.0,
        "break_even_epochs": 1.25,
    }
    assert never.to_json()["break_even_epochs"] is None
    json.dumps(never.to_json(), allow_nan=False)
    assert (pays.pays_after(), never.pays_after()) == ("pays after 1.25 epochs", "never pays")
