"""How many positions pass the head together where the recipe does not say; no number depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import make_recipe, run_alone, step_records, validation_records

from shared.cache import CacheReader
from shared.models.chunks import ON_CPU, automatic_chunk, chunk_positions
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture

GIB = 2**30


def test_a_number_is_taken_as_it_is_and_a_cpu_has_its_own() -> None:
    assert chunk_positions(7, 10**6, torch.device("cpu")) == 7
    assert chunk_positions("auto", 10**6, torch.device("cpu")) == ON_CPU


@pytest.mark.parametrize(
    ("num_ids", "memory_gib", "wanted"),
    [(248_320, 80, 2048), (248_320, 24, 768), (32_000, 24, 2048), (262_144, 8, 256), (10**7, 8, 256)],
)
def test_a_gpu_s_is_bounded_by_its_memory(num_ids: int, memory_gib: int, wanted: int) -> None:
    assert automatic_chunk(num_ids, memory_gib * GIB) == wanted


def captured(tree: dict[str, Any], path: Path, chunk_size: int | str) -> CacheReader:
    changed = tree | {
        "cache": tree["cache"] | {"path": str(path), "num_workers": 0, "chunk_size": chunk_size}
    }
    recipe = validate_tree(Recipe, changed | {"run": {"name": "unused"}}, origin="recipe test")
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    return CacheReader(str(path))


def test_a_cache_does_not_depend_on_it(distillation_tree: dict[str, Any], tmp_path: Path) -> None:
    """Ids, weights and sums, of every row; fewer positions at once than a row has, and all of them."""
    whole = captured(distillation_tree, tmp_path / "auto", "auto")
    for size in (1, 5):
        chunked = captured(distillation_tree, tmp_path / str(size), size)
        keys = list(whole.keys())
        for one, other in zip(chunked.rows(keys), whole.rows(keys), strict=True):
            targets, wanted = chunked.targets([one]), whole.targets([other])
            assert one.ce_sum == pytest.approx(other.ce_sum, rel=1e-6)
            assert one.entropy_sums == pytest.approx(other.entropy_sums, rel=1e-6)
            assert torch.equal(targets.ids, wanted.ids)
            for temperature in (1.0, 2.0):
                ours, theirs = targets.weights(temperature), wanted.weights(temperature)
                torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-6)  # a step of what is stored


def test_a_student_does_not_depend_on_it(distillation_tree: dict[str, Any], tmp_path: Path) -> None:
    """Losses of steps and validations, at another temperature than 1."""
    settings = {"run__root": str(tmp_path), "run__num_workers": 0, "run__export": False}
    settings |= {"loss__temperature": 2.0, "optimization__max_steps": 2}
    found = []
    for size in ("auto", 1, 5):
        recipe = make_recipe(distillation_tree, **settings, run__name=f"chunk-{size}", loss__chunk_size=size)
        assert run_alone(recipe) == 0
        numbers = [[v for v in r.values() if isinstance(v, float)] for r in step_records(recipe)]
        numbers += [[r[name] for name in ("loss", "ce_loss", "kd_loss")] for r in validation_records(recipe)]
        found.append(numbers)
    assert len(found[0]) == 4
    for numbers in found[1:]:
        for one, other in zip(numbers, found[0], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
