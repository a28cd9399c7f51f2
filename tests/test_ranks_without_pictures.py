"""A rank whose rows have no picture takes part in what the others' pictures ask of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from samples import encoded_picture
from stage2_runs import (
    make_recipe,
    on_ranks,
    run_alone,
    state_of,
    step_records,
    validation_records,
)

from shared.cache import CacheReader
from shared.recipes import Recipe
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.train import train


@pytest.mark.parametrize("batch_tokens", [1, 16384], ids=["a row each", "rows together"])
def test_a_teacher_sharded_over_two_ranks(
    tmp_path: Path, mixed_folder: Path, teacher_folder: Path, student_folder: Path, batch_tokens: int
) -> None:
    """Eleven units: one rank idles at the end, with a row of text."""
    whole, sharded = (
        make_recipe(
            {
                "data": {"source": str(mixed_folder), "max_answer_tokens": 64, "limit": 7},
                "teacher": {"model": str(teacher_folder), "dtype": "float32", "shard": shard},
                "cache": {"path": str(tmp_path / f"cache-{shard}"), "num_workers": 0},
                "student": {"model": str(student_folder)},
                "optimization": {"max_steps": 1},
                "run": {"name": "unused"},
            },
            cache__examples_per_shard=1,
            cache__batch_tokens=batch_tokens,
        )
        for shard in (False, True)
    )
    options = {"collective_timeout_s": 30}
    assert on_ranks(1, lambda world: capture(whole, world, StopRequest()), **options) == [0]
    assert on_ranks(2, lambda world: capture(sharded, world, StopRequest()), **options) == [0, 0]
    ours, theirs = (CacheReader(str(recipe.cache.path)) for recipe in (sharded, whole) if recipe.cache)
    keys = list(theirs.keys())
    mine, other = ours.rows(keys), theirs.rows(keys)
    assert len(keys) == 11  # of both splits
    assert [row.ce_sum for row in mine] == pytest.approx([row.ce_sum for row in other], rel=1e-5)


@pytest.fixture
def tree(tmp_path: Path, mixed_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(mixed_folder), "max_answer_tokens": 64, "limit": 6},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0, "chunk_size": 16},
        "optimization": {
            "global_batch_size": 6,
            "microbatch_size": 6,
            "max_steps": 3,
            "learning_rate": 1e-2,
        },
        "run": {"name": "one", "root": str(tmp_path), "num_workers": 0, "export": False},
    }


def run_two(recipe: Recipe) -> None:
    """A rank that waits for another in vain ends soon."""
    assert on_ranks(2, lambda world: train(recipe, world, resume=False), collective_timeout_s=30) == [0, 0]


@pytest.mark.parametrize(
    "student",
    [
        {},
        {"freeze": {"vision": True}},
        {"freeze": {"vision": True, "connector": True}},
        {"activation_checkpointing": True},
        {"lora": {"rank": 4}},
    ],
    ids=["trained", "frozen tower", "frozen pictures", "recomputed", "adapters"],
)
def test_two_ranks_equal_one(tree: dict[str, Any], student: dict[str, Any]) -> None:
    """Microbatches of one row: in each round one rank or the other may have no picture, or both."""
    settings = {f"student__{name}": value for name, value in student.items()}
    one = make_recipe(tree, **settings)
    two = make_recipe(tree, **settings, run__name="two", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    run_two(two)
    assert_same_training(two, one, step=3)


def test_bf16_on_two_ranks_stays_near_one(tree: dict[str, Any]) -> None:
    one = make_recipe(tree, student__compute_dtype="bfloat16")
    two = make_recipe(
        tree, student__compute_dtype="bfloat16", run__name="two", optimization__microbatch_size=1
    )
    assert run_alone(one) == 0
    run_two(two)
    for ours, theirs in zip(step_records(two), step_records(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)


def test_steps_without_any_picture_are_the_same_however_they_are_cut(tree: dict[str, Any]) -> None:
    """The tower's gradient is then zero, not missing: its moments go on, alike on one rank and on two."""
    steps = {"optimization__global_batch_size": 2, "optimization__max_steps": 9}
    one = make_recipe(tree, **steps, optimization__microbatch_size=2)
    cut = make_recipe(tree, **steps, run__name="cut", optimization__microbatch_size=1)
    two = make_recipe(tree, **steps, run__name="two", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    assert run_alone(cut) == 0
    run_two(two)
    assert_same_training(cut, one, step=9)
    assert_same_training(two, one, step=9)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Nine rows of text alone, and one with a picture at the end."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "0.png").write_bytes(encoded_picture(0))
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
    rows = [{"messages": turns, "images": []} for _ in range(9)] + [{"messages": turns, "images": ["0.png"]}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "validation.jsonl").write_text(json.dumps(rows[-1]))
    return folder


@pytest.mark.parametrize("validation", [None, "validation"])
def test_the_tower_need_not_have_run_before_a_step_without_pictures(
    tree: dict[str, Any], texts: Path, validation: str | None
) -> None:
    """Neither at the start nor after a resume, where nothing is validated first."""
    tree["data"] = {"source": str(texts), "splits": {"train": "train", "validation": validation}}
    steps = {"optimization__global_batch_size": 4, "optimization__max_steps": 4, "run__checkpoint_every": 1}
    one = make_recipe(tree, **steps, optimization__microbatch_size=4)
    cut = make_recipe(tree, **steps, run__name="cut", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    assert run_alone(cut) == 0
    assert_same_training(cut, one, step=4)
    longer = make_recipe(tree, **steps | {"optimization__max_steps": 6}, run__name="cut")
    assert run_alone(longer, resume=True) == 0


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def assert_same_training(ours: Recipe, theirs: Recipe, *, step: int) -> None:
    """Losses, and the tensors that the updates are made of."""
    for mine, other in zip(
        step_records(ours) + validation_records(ours),
        step_records(theirs) + validation_records(theirs),
        strict=True,
    ):
        assert numbers(mine) == pytest.approx(numbers(other), rel=1e-4)
    mine_state, other_state = state_of(ours, step), state_of(theirs, step)
    moments = [name for name in other_state if name.startswith("exp_avg.")]
    assert moments
    for name in moments:
        torch.testing.assert_close(
            mine_state[name], other_state[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# Towers beside the language model, cross-attention inside of it, prefixes that see each other, experts.
QUICK = ("mllama", "llava_next")
OTHERS = ("qwen2_5_vl", "qwen3_vl_moe", "smolvlm", "gemma3", "gemma4", "llava_onevision", "internvl")


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_families_on_two_ranks_equal_one(tree: dict[str, Any], tmp_path: Path, family: str) -> None:
    folder = make_family(family, tmp_path / family)
    settings = {"student__model": str(folder), "optimization__max_steps": 1}
    one = make_recipe(tree, **settings, optimization__microbatch_size=1)
    two = make_recipe(tree, **settings, run__name="two", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    run_two(two)
    assert_same_training(two, one, step=1)
