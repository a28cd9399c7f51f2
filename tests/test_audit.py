"""The audit: a cache against the teacher that made it, with the teacher's own noise beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shared.cache import CacheReader
from shared.cache.layout import LOG_NAME
from shared.config import Recipe
from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError
from shared.recipe_files import validate_tree
from shared.runtime import StopRequest, distributed
from shared.vlm import load_vlm
from stage1_teacher.__main__ import commands
from stage1_teacher.audit import AtTemperature, Audit, audit
from stage1_teacher.capture import capture
from stage1_teacher.head_gradient import HeadGradients


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }


def captured(tree: dict[str, Any], **cache: Any) -> tuple[Recipe, Path]:
    recipe = validate_tree(Recipe, tree | {"cache": tree["cache"] | cache}, origin="test")
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert recipe.cache is not None
    return recipe, Path(recipe.cache.path)


def audited(recipe: Recipe, path: Path, *, num_examples: int = 64) -> Audit:
    with distributed(device="cpu") as world:
        return audit(recipe, CacheReader(path), world, num_examples=num_examples)


def worst(result: AtTemperature) -> float:
    return result.worst_case[1]


def test_a_cache_that_keeps_everything_is_as_near_as_fp16_allows(tree: dict[str, Any]) -> None:
    (result,) = audited(*captured(tree, policy={"kind": "top_k", "k": 10_000})).results
    assert result.top1_agreement.cache == 1.0
    assert result.kept_mass.cache == pytest.approx(1, abs=1e-3)
    assert result.kl.cache == pytest.approx(0, abs=1e-3)
    for size, error in result.gradient_error.items():
        assert error.cache is not None
        assert error.cache < 0.02
        assert error.floor is not None
        assert error.floor < 1e-3
        assert result.gradient_cosine[size].cache == pytest.approx(1, abs=1e-3)


def test_a_draw_has_no_bias_and_a_cut_has_one(tree: dict[str, Any], tmp_path: Path) -> None:
    (drawn,) = audited(*captured(tree, policy={"kind": "threshold", "tau": 1 / 64})).results
    (cut,) = audited(*captured(tree, path=str(tmp_path / "cut"), policy={"kind": "top_k", "k": 4})).results
    assert drawn.logprob_bias.cache is not None
    assert abs(drawn.logprob_bias.cache) < 5 * drawn.logprob_bias_error
    assert drawn.kl.cache is None
    assert cut.logprob_bias.cache is not None
    assert abs(cut.logprob_bias.cache) > 20 * cut.logprob_bias_error
    assert cut.kept_mass.cache is not None
    assert cut.kept_mass.cache < 0.5
    assert cut.kl.cache is not None
    assert cut.kl.cache > 0.01
    assert cut.top1_agreement.cache == 1.0


def test_a_smaller_tau_is_nearer(tree: dict[str, Any], tmp_path: Path) -> None:
    errors = [
        worst(
            audited(
                *captured(tree, path=str(tmp_path / f"c{n}"), policy={"kind": "threshold", "tau": 1 / n})
            ).results[0]
        )
        for n in (8, 128, 2048)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_each_captured_temperature_is_audited(tree: dict[str, Any]) -> None:
    found = audited(*captured(tree, temperatures=[1.0, 2.0]))
    assert [result.temperature for result in found.results] == [1.0, 2.0]
    assert all(worst(result) < 0.5 for result in found.results)
    assert found.num_not_cached == 0
    assert found.num_examples == len(CacheReader(found.cache))


def test_gradients_against_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    features_NC = torch.randn(128, 5, generator=generator)
    live_NV, other_NV = torch.randn(2, 128, 7, generator=generator).softmax(-1)
    student_V = torch.randn(7, generator=generator).softmax(-1)
    gradients = HeadGradients(128)
    for block in (slice(0, 64), slice(64, 128)):
        taught = {"cache": other_NV[block] - student_V, "floor": live_NV[block] - student_V}
        gradients.add(features_NC[block], live_NV[block], taught, student_V)
    expected = []
    for block in (slice(0, 64), slice(64, 128)):
        pairs = [
            torch.einsum("nv,nc->vc", p[block] - student_V, features_NC[block]) for p in (live_NV, other_NV)
        ]
        expected.append(((pairs[1] - pairs[0]).norm() / pairs[0].norm()).item())
    assert list(gradients.errors()) == [64]
    assert gradients.errors()[64].cache == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert gradients.errors()[64].floor == pytest.approx(0, abs=1e-6)
    assert gradients.cosines()[64].floor == pytest.approx(1, abs=1e-6)


def test_fewer_positions_than_a_block_are_one_batch() -> None:
    gradients = HeadGradients(10)
    live_NV = torch.full((10, 3), 1 / 3)
    taught_NV = live_NV - torch.tensor([0.2, 0.3, 0.5])
    gradients.add(
        torch.ones(10, 2), live_NV, {"cache": taught_NV, "floor": taught_NV}, torch.tensor([0.2, 0.3, 0.5])
    )
    assert list(gradients.errors()) == [10]
    assert gradients.errors()[10].cache == pytest.approx(0, abs=1e-6)


# --- the command -----------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(commands, ["audit", *arguments], standalone_mode=False)


def test_the_command_finds_the_recipe_in_the_cache(tree: dict[str, Any]) -> None:
    _, path = captured(tree)
    shown = invoke(str(path), "--examples", "8")
    assert (shown.exception, shown.return_value) == (None, 0)
    for words in ("top-1 agreement", "kept mass", "noise floor", "head gradient", "bias in log-prob"):
        assert words in shown.output
    asked = invoke(str(path), "--examples", "8", "--json")
    found = json.loads(asked.stdout)
    assert found["num_examples"] == 8
    (result,) = found["results"]
    assert math.isfinite(next(iter(result["gradient_error"].values()))["cache"])


def test_settings_are_laid_over_the_recipe_of_the_cache(tree: dict[str, Any]) -> None:
    _, path = captured(tree)
    gone = invoke(str(path), "--set", "teacher.model=nowhere")
    assert gone.exception is not None
    assert "nowhere" in str(gone.exception)
    unknown = invoke(str(path), "--set", "data.limits=3")
    assert isinstance(unknown.exception, RecipeError)
    assert "did you mean 'limit'?" in str(unknown.exception)


def test_a_bound_turns_the_status_red(tree: dict[str, Any]) -> None:
    _, path = captured(tree, policy={"kind": "threshold", "tau": 1 / 4})
    assert invoke(str(path), "--max-error", "100").return_value == 0
    red = invoke(str(path), "--max-error", "0.0001")
    assert red.return_value == CacheFormatError.exit_status
    assert "more than 0.0001" in red.output


def test_another_teacher_is_refused(tree: dict[str, Any], tmp_path: Path, teacher_folder: Path) -> None:
    recipe, path = captured(tree)
    model = load_vlm(str(teacher_folder), revision=None, dtype=torch.float32, attn_implementation=None)
    other = tmp_path / "other"
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for file in teacher_folder.iterdir():
        (other / file.name).parent.mkdir(exist_ok=True)
        (other / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(other)
    assert recipe.teacher is not None
    changed = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": str(other)})})
    with pytest.raises(CacheMismatchError, match="Audit it with the teacher that made it"):
        audited(changed, path)


def test_other_inputs_are_refused(tree: dict[str, Any]) -> None:
    recipe, path = captured(tree)
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_answer_tokens": 7})})
    with pytest.raises(CacheMismatchError, match="max_answer_tokens: 64 in the cache, 7 asked for"):
        audited(changed, path)


def test_data_that_the_cache_does_not_hold(tree: dict[str, Any], tmp_path: Path) -> None:
    from shared.phantom.dataset import write_dataset

    recipe, path = captured(tree)
    write_dataset(tmp_path / "others", pictures={"train": 2, "validation": 1, "test": 1}, seed=99)
    changed = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"source": str(tmp_path / "others")})}
    )
    with pytest.raises(DataError, match="is in it"):
        audited(changed, path)


def test_a_cache_without_a_log_asks_for_the_recipe(tree: dict[str, Any]) -> None:
    _, path = captured(tree)
    (path / LOG_NAME).unlink()
    found = invoke(str(path))
    assert isinstance(found.exception, CacheFormatError)
    assert "--recipe" in str(found.exception)
