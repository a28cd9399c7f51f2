"""A teacher that several ranks share, by tensor or expert parallelism: what it stores, and what ends it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from stage2_runs import make_recipe, on_ranks
from test_capture import files, start, wait_for_shards

from shared.cache import CacheReader
from shared.cache.log import log_records
from shared.cache.storage import open_folder
from shared.errors import RecipeError
from shared.models.plans import has_plans
from shared.recipes import Recipe, dump_recipe
from shared.runtime import World
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.capturing.teacher import Teacher
from stage1_teacher.check import check_recipe
from stage1_teacher.estimate import estimate
from stage1_teacher.inspection.audit import audit

pytestmark = pytest.mark.skipif(not has_plans(), reason="needs a newer transformers")

WAIT = {"collective_timeout_s": 60}
RecipeOf = Callable[..., Recipe]


@pytest.fixture(scope="module")
def tree(mixed_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Rows with and without pictures, two in each of eight units."""
    return {
        "data": {"source": str(mixed_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {
            "path": "unused",
            "num_workers": 0,
            "examples_per_shard": 2,
            "batch_tokens": 512,
        },
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }


@pytest.fixture
def recipe_of(tree: dict[str, Any], tmp_path: Path) -> RecipeOf:
    return lambda cache, **settings: make_recipe(tree, cache__path=str(tmp_path / cache), **settings)


@pytest.fixture(scope="module")
def shared(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Of one copy, shared by two ranks."""
    path = tmp_path_factory.mktemp("shared") / "cache"
    return captured(make_recipe(tree, cache__path=str(path), teacher__tensor=2), 2)


def captured(recipe: Recipe, num_ranks: int) -> CacheReader:
    statuses = on_ranks(num_ranks, lambda world: capture(recipe, world, StopRequest()), **WAIT)
    assert statuses == [0] * num_ranks
    assert recipe.cache is not None
    return CacheReader(recipe.cache.path)


def sums(cache: CacheReader) -> dict[bytes, list[float]]:
    """Cross-entropy and entropy of every row."""
    keys = list(cache.keys())
    return {row.key: [row.ce_sum, *row.entropy_sums.tolist()] for row in cache.rows(keys)}


def assert_same_targets(one: CacheReader, other: CacheReader) -> None:
    wanted, found = sums(one), sums(other)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=1e-5)


def test_two_ranks_that_share_a_teacher_have_its_distributions(
    recipe_of: RecipeOf, shared: CacheReader
) -> None:
    whole = captured(recipe_of("whole"), 1)
    assert_same_targets(whole, shared)
    assert shared.manifest.identity == whole.manifest.identity
    assert shared.manifest.created_by["parallel"] == "tensor 2"
    log = log_records(open_folder(shared.location))
    found = next(record for record in log if record["event"] == "captured")
    assert (found["ranks"], found["tensor"], found["expert"]) == (2, 2, 1)
    assert found["examples"] == 16  # each counted once


def test_two_copies_write_the_bytes_of_one(recipe_of: RecipeOf, tmp_path: Path, shared: CacheReader) -> None:
    captured(recipe_of("two", teacher__tensor=2), 4)
    assert files(tmp_path / "two") == files(Path(shared.location))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"expert": 2}, id="experts", marks=pytest.mark.slow),
        pytest.param({"expert": 2, "tensor": 2}, id="both"),
    ],
)
def test_two_ranks_that_share_experts(recipe_of: RecipeOf, tmp_path: Path, sizes: dict[str, int]) -> None:
    """And 511 ids of the vocabulary, which two cannot share evenly."""
    model = str(make_family("qwen3_5_moe", tmp_path / "moe", num_key_value_heads=2, vocab_size=511))
    settings = {"teacher__model": model, "student__model": model}
    whole = captured(recipe_of("whole", **settings), 1)
    sizes = {f"teacher__{name}": size for name, size in sizes.items()}
    assert_same_targets(whole, captured(recipe_of("shared", **settings, **sizes), 2))


def test_an_estimate_counts_copies(recipe_of: RecipeOf) -> None:
    recipe = recipe_of("cache", teacher__tensor=2)
    run = partial(estimate, recipe, num_examples=4, taus=())
    found = on_ranks(2, lambda world: run(world=world), **WAIT)[0]
    assert found.num_ranks == 2
    assert found.costs.capture_s >= 16 * found.times.capture
    with pytest.raises(RecipeError, match=r"teacher.tensor 2: 3 process\(es\) found"):
        on_ranks(1, lambda world: run(world=world, num_ranks=3))


def test_a_check_counts_copies(recipe_of: RecipeOf) -> None:
    report = check_recipe(recipe_of("cache", teacher__tensor=2), num_ranks=4)
    assert report.problems == []
    assert dict(report.facts)["copies"] == "2, each shared by 2 ranks"


def test_an_audit_by_all_ranks_of_a_copy(recipe_of: RecipeOf, shared: CacheReader) -> None:
    recipe = recipe_of("cache", teacher__tensor=2)
    found = on_ranks(2, lambda world: audit(recipe, shared, world, num_examples=4), **WAIT)[0]
    assert found.num_examples == 4


def test_a_rank_alone_is_no_copy(recipe_of: RecipeOf) -> None:
    recipe = recipe_of("cache", teacher__tensor=2)
    with pytest.raises(
        RecipeError, match=r"teacher.tensor 2: 3 process\(es\) found, a multiple of 2 is needed"
    ):
        on_ranks(3, lambda world: capture(recipe, world, StopRequest()), **WAIT)
    report = check_recipe(recipe, num_ranks=3)
    assert any("teacher.tensor 2: 3 process(es) found" in problem for problem in map(str, report.problems))


@pytest.mark.parametrize(
    "dying", [pytest.param(0, id="leader", marks=pytest.mark.slow), pytest.param(1, id="follower")]
)
def test_a_rank_that_dies_ends_the_others_and_the_next_start_goes_on(
    recipe_of: RecipeOf, tmp_path: Path, shared: CacheReader, monkeypatch: pytest.MonkeyPatch, dying: int
) -> None:
    recipe = recipe_of("cache", teacher__tensor=2)

    def dies_at_the_sixth(world: World) -> int:
        calls = itertools.count(1)
        logits = Teacher._logits

        def counted(teacher: Teacher, hidden_nD: torch.Tensor) -> torch.Tensor:
            if world.rank == dying and next(calls) == 6:
                os._exit(1)
            return logits(teacher, hidden_nD)

        monkeypatch.setattr(Teacher, "_logits", counted)
        return capture(recipe, world, StopRequest())

    found = on_ranks(2, dies_at_the_sixth, errors=True, **WAIT)
    assert "another process of this job has ended" in str(found[1 - dying])
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert 0 < len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) < 8
    captured(recipe, 2)
    assert files(tmp_path / "cache") == files(Path(shared.location))


@pytest.mark.slow
def test_sigterm_ends_all_ranks_of_a_copy_in_order(
    recipe_of: RecipeOf, tmp_path: Path, shared: CacheReader
) -> None:
    tree = dump_recipe(recipe_of("cache", teacher__tensor=2))
    process = start(tree, tmp_path, nproc=2)
    wait_for_shards(process, tmp_path / "cache", 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "are captured and kept. To go on: " in output
    assert not (tmp_path / "cache" / "manifest.json").exists()
    captured(recipe_of("cache", teacher__tensor=2), 4)
    assert files(tmp_path / "cache") == files(Path(shared.location))
