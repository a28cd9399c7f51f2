"""The audit: a cache against the teacher that made it, with the teacher's own noise beside it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import torch
from click.testing import CliRunner
from reference_losses import truncated_kd

from shared.cache import CacheReader
from shared.cache.layout import LOG_NAME
from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError
from shared.kd_loss import fused_ce_kd
from shared.models.vlm import load_vlm
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.recipes.policies import DEFAULT_TAIL, TAIL_MODES, TopK
from shared.runtime import distributed
from shared.sparse import sparsify
from shared.stopping import StopRequest
from stage1_teacher.__main__ import commands
from stage1_teacher.capture import capture
from stage1_teacher.inspection.audit import Audit, audit
from stage1_teacher.inspection.comparison import AtTemperature
from stage1_teacher.inspection.head_gradient import BATCHES, HeadGradients, Measured, pull
from stage1_teacher.inspection.tools import recipe_of_cache


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


def audited(recipe: Recipe, path: Path, *, num_examples: int | None = None) -> Audit:
    with distributed(device="cpu") as world:
        return audit(recipe, CacheReader(path), world, num_examples=num_examples)


def error_over_64(result: AtTemperature) -> float:
    error = result.gradient_error[64].cache
    assert error is not None
    return error


def test_a_cache_that_keeps_everything_is_as_near_as_fp16_allows(tree: dict[str, Any]) -> None:
    (result,) = audited(*captured(tree, policy={"kind": "top_k", "k": 10_000})).results
    assert result.top1_agreement.cache == 1.0
    assert result.kept_mass.cache == pytest.approx(1, abs=1e-3)
    assert result.kl.cache == pytest.approx(0, abs=1e-3)
    assert error_over_64(result) < 0.02
    assert result.gradient_error[64].floor is not None
    assert result.gradient_error[64].floor < 1e-3
    assert result.gradient_cosine[64].cache == pytest.approx(1, abs=1e-3)


def test_a_draw_has_no_bias_and_a_cut_has_one(tree: dict[str, Any], tmp_path: Path) -> None:
    (drawn,) = audited(*captured(tree, policy={"kind": "threshold", "tau": 1 / 64})).results
    (cut,) = audited(*captured(tree, path=str(tmp_path / "cut"), policy={"kind": "top_k", "k": 4})).results
    assert drawn.logprob_bias.cache is not None
    assert drawn.logprob_bias_error is not None
    assert abs(drawn.logprob_bias.cache) < 5 * drawn.logprob_bias_error
    assert drawn.kl.cache is None
    assert cut.logprob_bias.cache is not None
    assert cut.logprob_bias_error is not None
    assert abs(cut.logprob_bias.cache) > 20 * cut.logprob_bias_error
    assert cut.kept_mass.cache is not None
    assert cut.kept_mass.cache < 0.5
    assert cut.kl.cache is not None
    assert cut.kl.cache > 0.01
    assert cut.top1_agreement.cache == 1.0


def test_a_smaller_tau_is_nearer(tree: dict[str, Any], tmp_path: Path) -> None:
    errors = [
        error_over_64(
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
    assert all(error_over_64(result) < 0.5 for result in found.results)
    assert (found.num_not_cached, found.num_unreadable) == (0, 0)
    assert found.num_examples == len(CacheReader(found.cache))


@pytest.mark.parametrize("num_positions", [63, 64, 600])
def test_a_size_without_enough_positions_has_no_figure(num_positions: int) -> None:
    """A smaller batch in its place would be another measure: the error falls with the number of positions."""
    gradients = HeadGradients(num_positions)
    for start in range(0, num_positions, 64):
        pull_nV = torch.eye(3).repeat(22, 1)[: min(64, num_positions - start)]
        gradients.add(torch.ones(len(pull_nV), 2), live_nV=pull_nV, cache_nV=pull_nV / 2, floor_nV=pull_nV)
    assert {size: measured.cache is not None for size, measured in gradients.errors().items()} == {
        size: num_positions >= size for size in (64, 512, 4096)
    }


def test_gradients_against_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    features_NC = torch.randn(128, 5, generator=generator)
    live_NV, cache_NV = torch.randn(2, 128, 7, generator=generator)
    gradients, expected = HeadGradients(128), []
    for block in (slice(0, 64), slice(64, 128)):
        live_nV, cache_nV, features_nC = live_NV[block], cache_NV[block], features_NC[block]
        gradients.add(features_nC, live_nV=live_nV, cache_nV=cache_nV, floor_nV=live_nV)
        pairs = [torch.einsum("nv,nc->vc", pull, features_nC) for pull in (live_nV, cache_nV)]
        expected.append(((pairs[1] - pairs[0]).norm() / pairs[0].norm()).item())
    assert gradients.errors()[64].cache == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert gradients.errors()[64].floor == pytest.approx(0, abs=1e-6)
    assert gradients.cosines()[64].floor == pytest.approx(1, abs=1e-6)


def test_without_a_second_pass_gradients_have_no_floor() -> None:
    gradients = HeadGradients(64)
    gradients.add(torch.ones(64, 2), live_nV=torch.ones(64, 3), cache_nV=torch.ones(64, 3), floor_nV=None)
    assert gradients.errors()[64] == Measured(cache=0.0, floor=None)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAIL_MODES)
def test_the_pull_is_the_gradient_of_the_loss(tail: str, temperature: float) -> None:
    logits_NV = torch.randn(3, 11, generator=torch.Generator().manual_seed(1)).double()
    targets = sparsify(
        logits_NV.float().log_softmax(-1), TopK(k=4), temperatures=(1.0, 2.0), seeds=torch.arange(3)
    )
    student_V = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    pull_NV = pull(
        targets, (student_V.detach() / temperature).softmax(-1), temperature=temperature, tail=tail
    )
    for position in range(3):
        one = targets.slice(position, position + 1)
        loss = truncated_kd(student_V, one.ids, one.weights(temperature), temperature, tail)
        (gradient_V,) = torch.autograd.grad(loss, student_V)
        torch.testing.assert_close(pull_NV[position], -gradient_V / temperature, rtol=1e-5, atol=1e-6)


def test_the_tail_is_that_of_the_recipe(tree: dict[str, Any]) -> None:
    """What a student feels of a cut cache depends on where the loss puts the rest."""
    recipe, path = captured(tree, policy={"kind": "top_k", "k": 4})
    found = {
        tail: audited(recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"tail": tail})}), path)
        for tail in (None, *TAIL_MODES)
    }
    assert [one.tail for one in found.values()] == [DEFAULT_TAIL, *TAIL_MODES]
    assert found[None].results == found[DEFAULT_TAIL].results
    assert len({error_over_64(found[tail].results[0]) for tail in TAIL_MODES}) == 4
    kl = {tail: found[tail].results[0].kl.cache for tail in TAIL_MODES}
    assert kl["ghost"] is not None
    assert kl["uniform"] is not None
    assert 0 < kl["ghost"] != kl["uniform"] > 0
    assert kl["renormalize"] is kl["drop"] is None


def test_the_default_tail_is_that_of_the_trainers_loss() -> None:
    assert inspect.signature(fused_ce_kd).parameters["tail"].default == DEFAULT_TAIL


def test_one_example_has_neither_a_noise_floor_nor_a_standard_error(tree: dict[str, Any]) -> None:
    """Its batch is of one shape in both passes, and one number has no scatter: a zero would be a claim."""
    found = audited(*captured(tree), num_examples=1)
    (result,) = found.results
    assert found.num_examples == 1
    assert result.logprob_bias_error is result.answer_bias_error is None
    floors = [getattr(result, name).floor for name in ("top1_agreement", "kept_mass", "logprob_bias", "kl")]
    assert floors == [None] * 4
    assert [measured.floor for measured in result.gradient_error.values()] == [None] * 3
    assert result.kept_mass.cache is not None


def test_batches_of_one_have_no_noise_floor(tree: dict[str, Any]) -> None:
    (result,) = audited(*captured(tree, batch_tokens=1)).results
    assert result.kept_mass.floor is None
    assert result.gradient_error[64].floor is None
    assert result.logprob_bias_error is not None


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
    assert set(result["gradient_error"]) == {"64", "512", "4096"}
    assert result["gradient_error"]["4096"] == {"cache": None, "floor": None}
    assert found["tail"] is None


def test_a_missing_size_says_what_it_needs(tree: dict[str, Any]) -> None:
    _, path = captured(tree)
    (line,) = [line for line in invoke(str(path)).output.splitlines() if "4,096 positions: error" in line]
    assert line.split()[-5:] == ["-", "-", "(needs", "4,096", "positions)"]


def test_the_tail_is_named(tree: dict[str, Any]) -> None:
    _, path = captured(tree, policy={"kind": "top_k", "k": 4})
    assert "tail drop" in invoke(str(path), "--set", "loss.tail=drop").output
    assert f"tail {DEFAULT_TAIL}" in invoke(str(path)).output


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
    size = ("--max-error-positions", "64")
    assert invoke(str(path), "--max-error", "100", *size).return_value == 0
    red = invoke(str(path), "--max-error", "0.0001", *size)
    assert red.return_value == CacheFormatError.exit_status
    assert "over 64 positions" in red.output
    assert "more than 0.0001" in red.output


def test_a_bound_without_enough_positions_is_no_pass(tree: dict[str, Any]) -> None:
    """It is always of the size that was asked for, 512 by default, so that its meaning does not change."""
    _, path = captured(tree)
    found = invoke(str(path), "--max-error", "100")
    assert isinstance(found.exception, DataError)
    for words in ("over 512 positions", "(--examples)", "(--max-error-positions)"):
        assert words in str(found.exception)


def test_the_sizes_of_the_option_are_those_that_are_measured() -> None:
    (option,) = [one for one in commands.commands["audit"].params if one.name == "max_error_positions"]
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == BATCHES
    assert option.default == 512


def test_examples_are_drawn_until_there_are_positions_enough(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path = captured(tree)
    monkeypatch.setattr("stage1_teacher.inspection.audit.MIN_EXAMPLES", 2)
    monkeypatch.setattr("stage1_teacher.inspection.audit.ENOUGH_POSITIONS", 40)
    found = audited(recipe, path)
    assert 40 <= found.num_positions < 40 + 64  # an answer's at most
    assert 2 <= found.num_examples < len(CacheReader(path))
    monkeypatch.setattr("stage1_teacher.inspection.audit.MAX_EXAMPLES", 2)
    assert audited(recipe, path).num_examples == 2


def test_rows_that_cannot_be_read_are_counted_apart(
    tree: dict[str, Any], tmp_path: Path, vqa_folder: Path
) -> None:
    _, path = captured(tree)
    data = datasets.load_dataset("parquet", data_files=str(vqa_folder / "train-*.parquet"), split="train")
    rows = data.cast_column("image_id", datasets.Image(decode=False)).to_list()
    rows[0]["answer"] = ""
    rows[1]["question"] = "Another?"
    changed = datasets.Dataset.from_list(rows, features=data.features)
    (tmp_path / "changed").mkdir()
    changed.to_parquet(str(tmp_path / "changed" / "train-00000-of-00001.parquet"))
    settings = {"data.source": str(tmp_path / "changed"), "data.splits.validation": "null"}
    options = [f"--set={key}={value}" for key, value in settings.items()]
    found = json.loads(invoke(str(path), "--json", *options).stdout)
    assert (found["num_unreadable"], found["num_not_cached"]) == (1, 1)
    shown = invoke(str(path), *options)
    assert "1 row(s) are not in the cache, 1 cannot be read" in shown.output


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


@pytest.mark.parametrize("line", [b"{half a li", b"[]", b"5", b"\xff\xfe\xff", b"", b'{"recipe": "mine"}'])
def test_damaged_lines_of_the_log_are_passed_over(tree: dict[str, Any], line: bytes) -> None:
    recipe, path = captured(tree)
    with (path / LOG_NAME).open("ab") as log:
        log.write(line + b"\n")
    assert recipe_of_cache(CacheReader(str(path))) == recipe


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "cache", "--max-error", "inf"),
        ("audit", "cache", "--max-error", "nan"),
        ("audit", "cache", "--seed", "99999999999999999999999"),
        ("estimate", "recipe", "--tau", "1e-9"),
        ("estimate", "recipe", "--tau", "nan"),
        ("estimate", "recipe", "--epochs", "nan"),
        ("estimate", "recipe", "--epochs", "inf"),
    ],
)
def test_numbers_that_mean_nothing_are_usage_errors(arguments: tuple[str, ...]) -> None:
    found = CliRunner().invoke(commands, arguments)
    assert (found.exit_code, found.exception.__class__) == (2, SystemExit)
    assert f"Invalid value for '{arguments[2]}'" in found.output


def test_the_bounds_themselves_are_no_usage_errors(tree: dict[str, Any]) -> None:
    _, path = captured(tree)
    assert invoke(str(path), "--examples", "2", "--seed", str(2**63 - 1)).return_value == 0


def test_an_export_to_a_remote_place_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = captured(tree)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(commands, ["export", str(path), "s3://bucket/x"], standalone_mode=False)
    assert isinstance(found.exception, RecipeError)
    assert "s3://bucket/x" in str(found.exception)
    assert not (tmp_path / "s3:").exists()
