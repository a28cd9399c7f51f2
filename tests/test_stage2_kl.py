"""KL to the teacher in validation: of every student at temperature 1, whatever its loss; of labels alone as well.

A student of labels alone trains without the cache.  Where its recipe names one that is there and fits, validation
reads it, and only validation: whatever is wrong with it costs the figure and nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import assert_same_state, make_recipe, run_alone, run_ranks, state_of, step_records
from stage2_runs import records as all_records
from transformers import AutoModelForImageTextToText

from shared.cache import CacheReader
from shared.data.collation import places_of
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.evaluation.run_records import points, read_run

LABELS_ALONE = {"loss__kd_ratio": 0.0}


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    run = {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False}
    steps = distillation_tree["optimization"] | {"max_steps": 2}
    return distillation_tree | {"run": run, "optimization": steps}


def kls(recipe: Recipe) -> list[float | None]:
    return [record["kl"] for record in all_records(recipe) if record["event"] == "validation"]


def test_students_of_labels_of_one_temperature_and_of_another_report_one_figure(tree: dict[str, Any]) -> None:
    soft = make_recipe(tree, run__name="soft", loss__kd_ratio=0.5)
    warm = make_recipe(tree, run__name="warm", loss__kd_ratio=0.5, loss__temperature=2.0)
    hard = make_recipe(tree, run__name="hard", **LABELS_ALONE)
    hot = make_recipe(tree, run__name="hot", **LABELS_ALONE, loss__temperature=7.0)  # which takes no part
    for recipe in (soft, warm, hard, hot):
        assert run_alone(recipe) == 0
    first = kls(soft)[0]
    assert first is not None
    assert first > 0
    validations = [record for record in all_records(soft) if record["event"] == "validation"]
    assert [record["kd_loss"] for record in validations] == pytest.approx(kls(soft))
    for recipe in (warm, hard, hot):
        before, after = kls(recipe)
        assert before == pytest.approx(first, rel=1e-6)
        assert after is not None
        results = json.loads((recipe.run.path / "results.json").read_text())
        assert (results["before"]["kl"], results["after"]["kl"]) == (before, after)
    assert all(record.get("kd_loss") is None for record in all_records(hard))
    assert all("kl" not in record for record in all_records(hard) if record["event"] == "step")


def test_of_what_was_cut_off_it_is_one_figure_whatever_the_loss_s_tail(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    cache = {"path": str(tmp_path / "cut"), "policy": {"kind": "top_k", "k": 8}, "num_workers": 0}
    recipe = make_recipe(tree | {"cache": cache}, optimization__max_steps=1)
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    found = []
    for tail in ("ghost", "uniform"):
        one = make_recipe(tree | {"cache": cache}, run__name=tail, loss__tail=tail, optimization__max_steps=1)
        assert run_alone(one) == 0
        before, _ = (record for record in all_records(one) if record["event"] == "validation")
        found.append((before["kl"], before["kd_loss"]))
        assert bool(points(read_run(one.run.path), "step", "kl")) is (tail == "ghost")
    (bound, ghost), (same, uniform) = found
    assert same == bound == pytest.approx(ghost)
    assert uniform > 1.1 * bound


def test_it_is_alike_at_all_places_for_a_student_that_is_its_teacher(
    tree: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    """A cache keeps the entropy of each row alone; nearly nothing is drawn here.

    It is not zero: the student has mass at ids of its head that are no tokens.
    """
    cache = {"path": str(tmp_path / "whole"), "policy": {"kind": "threshold", "tau": 1e-6}, "num_workers": 0}
    student = tree["student"] | {"model": str(teacher_folder)}
    recipe = make_recipe(tree | {"student": student, "cache": cache}, optimization__max_steps=1)
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert run_alone(recipe) == 0
    before, _ = (record for record in all_records(recipe) if record["event"] == "validation")
    assert before["by_place"]["kl"] == pytest.approx([before["kl"]] * len(before["by_place"]["kl"]), abs=0.02)


def test_it_is_told_by_place_in_the_answer_and_by_kind_on_any_number_of_ranks(tree: dict[str, Any]) -> None:
    one = make_recipe(tree, run__name="one")
    two = make_recipe(tree, run__name="two")
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    (alone, _), (shared, _) = (
        [record for record in all_records(recipe) if record["event"] == "validation"] for recipe in (one, two)
    )
    for group in ("by_place", "by_kind"):
        means = alone[group]
        for name, total in (("ce", alone["ce_loss"]), ("kl", alone["kl"])):
            weighted = sum(a * b for a, b in zip(means[name], means["positions"], strict=True))
            assert weighted / sum(means["positions"]) == pytest.approx(total, rel=1e-5)
            assert shared[group][name] == pytest.approx(means[name], rel=1e-5)
        assert (shared[group]["names"], shared[group]["positions"]) == (means["names"], means["positions"])
    split = open_split(one.data, "validation")
    assert alone["by_row"]["rows"] == shared["by_row"]["rows"] == len(split)
    for name, total in (("ce", alone["ce_loss"]), ("kl", alone["kl"])):
        assert shared["by_row"][name] == pytest.approx(alone["by_row"][name], rel=1e-5)
        assert alone["by_row"][name] != pytest.approx(total, rel=1e-5)  # the answers differ in length
    assert alone["by_place"]["positions"][0] == len(split)
    assert alone["by_kind"]["names"] == sorted({example.kind for example in split})


def test_each_answer_of_a_conversation_has_places_of_its_own() -> None:
    labels = torch.tensor([-100, 5, 6, -100, 7, 8, 9, -100, -100, 3])
    assert places_of(labels) == [0, 1, 0, 1, 2, 0]
    assert places_of(torch.full((3,), -100)) == []


def test_it_equals_the_teacher_s_and_the_student_s_own_logits(
    tree: dict[str, Any],
    teacher_folder: Path,
    student_folder: Path,
    processor: ExampleProcessor,
    tmp_path: Path,
) -> None:
    """With a threshold so low that nearly nothing is drawn, the cache is exact to fp16."""
    cache = {"path": str(tmp_path / "whole"), "policy": {"kind": "threshold", "tau": 1e-6}, "num_workers": 0}
    recipe = make_recipe(tree | {"cache": cache}, **LABELS_ALONE, optimization__max_steps=1)
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert run_alone(recipe) == 0
    teacher, student = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (teacher_folder, student_folder)
    )
    total, count, num_ids = 0.0, 0, processor.num_token_ids
    for example in open_split(recipe.data, "validation"):
        one = processor.encode(example)
        inputs = processor.collate([one]).inputs
        with torch.no_grad():
            p, q = (m(**inputs).logits[0, -one.num_positions - 1 : -1].double() for m in (teacher, student))
        p, q = p[:, :num_ids].log_softmax(-1), q.log_softmax(-1)[:, :num_ids]
        total += (p.exp() * (p - q)).sum().item()
        count += one.num_positions
    assert kls(recipe)[0] == pytest.approx(total / count, rel=1e-3)


def test_labels_alone_train_the_same_bit_for_bit_with_a_cache_and_without(tree: dict[str, Any]) -> None:
    seen = make_recipe(tree, run__name="seen", **LABELS_ALONE)
    blind = make_recipe(tree, run__name="blind", **LABELS_ALONE, cache__path="/nowhere/cache")
    bare = make_recipe({k: v for k, v in tree.items() if k != "cache"}, run__name="bare", **LABELS_ALONE)
    for recipe in (seen, blind, bare):
        assert run_alone(recipe) == 0
    assert None not in kls(seen)
    for recipe in (blind, bare):
        assert kls(recipe) == [None, None]
        assert step_records(recipe) == step_records(seen)
        assert_same_state(state_of(recipe, 2), state_of(seen, 2))


def test_a_cache_that_comes_or_goes_does_not_keep_a_run_from_going_on(tree: dict[str, Any]) -> None:
    first = make_recipe(tree, **LABELS_ALONE, cache__path="/nowhere/cache")
    rest = make_recipe(tree, **LABELS_ALONE, optimization__max_steps=3)
    assert run_alone(first) == 0
    assert run_alone(rest, resume=True) == 0
    assert [value is None for value in kls(rest)] == [True, True, False]


def damaged(cache: Path) -> None:
    shard = next(cache.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-40] + b"x" * 40)


def lost(cache: Path) -> None:
    next(cache.glob("*.arrow")).unlink()


def without_manifest(cache: Path) -> None:
    (cache / "manifest.json").unlink()


@pytest.mark.parametrize(("spoil", "num_ranks"), [(damaged, 2), (lost, 1), (without_manifest, 1)])
def test_whatever_is_wrong_with_the_cache_costs_the_figure_alone(
    tree: dict[str, Any], tmp_path: Path, teacher_cache: Path, spoil: Any, num_ranks: int, capfd: Any
) -> None:
    shutil.copytree(teacher_cache, tmp_path / "cache")
    spoil(tmp_path / "cache")
    recipe = make_recipe(tree, **LABELS_ALONE, cache__path=str(tmp_path / "cache"))
    statuses = [run_alone(recipe)] if num_ranks == 1 else run_ranks(recipe, num_ranks)
    assert statuses == [0] * num_ranks
    assert kls(recipe) == [None, None]
    shown = "".join(capfd.readouterr())
    assert shown.count("no KL to the teacher") == 1
    assert str(tmp_path / "cache") in shown


@pytest.mark.parametrize(
    "other",
    [
        {"cache__temperatures": [3.0]},  # another cache than the recipe's
        {"data__system_prompt": "Look well."},  # other rows than the recipe's
    ],
    ids=str,
)
def test_a_cache_of_something_else_is_told_and_left(
    tree: dict[str, Any], other: dict[str, Any], capfd: Any
) -> None:
    recipe = make_recipe(tree, **LABELS_ALONE, **other)
    assert run_alone(recipe) == 0
    assert kls(recipe) == [None, None]
    assert "no KL to the teacher" in "".join(capfd.readouterr())


def test_a_cache_of_the_training_split_alone_is_told_and_left(
    tree: dict[str, Any], tmp_path: Path, capfd: Any
) -> None:
    cache = {"path": str(tmp_path / "train"), "splits": ["train"], "num_workers": 0}
    recipe = make_recipe(tree | {"cache": cache}, **LABELS_ALONE)
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert run_alone(recipe) == 0
    assert kls(recipe) == [None, None]
    assert "no KL to the teacher" in "".join(capfd.readouterr())


def test_two_ranks_report_what_one_does(tree: dict[str, Any]) -> None:
    alone, together = (make_recipe(tree, run__name=name, **LABELS_ALONE) for name in ("one", "two"))
    assert run_alone(alone) == 0
    assert run_ranks(together, 2) == [0, 0]
    (first, _), (same, _) = kls(alone), kls(together)
    assert first is not None
    assert same == pytest.approx(first, rel=1e-6)
    assert not math.isnan(first)


def test_a_student_of_a_cache_without_temperature_one_has_no_such_figure(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    cache = {"path": str(tmp_path / "warm"), "temperatures": [2.0], "num_workers": 0}
    recipe = validate_tree(
        Recipe,
        tree | {"cache": cache, "loss": {"kd_ratio": 0.5, "temperature": 2.0}},
        origin="test",
    )
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert run_alone(recipe) == 0
    assert kls(recipe) == [None, None]


def test_the_teacher_s_own_cross_entropy_is_beside_it(tree: dict[str, Any], teacher_cache: Path) -> None:
    recipe = make_recipe(tree, **LABELS_ALONE, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    processor, reader = open_processor(recipe.student.model, recipe.data), CacheReader(str(teacher_cache))
    rows = reader.rows([processor.key(one) for one in open_split(recipe.data, "validation")])
    expected = sum(row.ce_sum for row in rows) / sum(row.num_positions for row in rows)
    found = [one["teacher_ce_loss"] for one in all_records(recipe) if one["event"] == "validation"]
    assert found == pytest.approx([expected, expected])
