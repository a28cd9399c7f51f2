"""The student: its parts, its losses against Transformers' own, what training changes and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import (
    make_recipe,
    on_ranks,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    teacher_of,
    validation_records,
)
from torch._dynamo.utils import counters as dynamo_counters
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3_5ForConditionalGeneration

from shared.data.processing import ExampleProcessor
from shared.data.rows import open_split
from shared.errors import RecipeError, TrainingError
from shared.recipes import FreezeConfig
from shared.runtime import World
from stage2_student.training.freezing import find_parts, freeze, parameters_of_parts
from stage2_student.training.inputs import open_inputs
from stage2_student.training.order import Slot
from stage2_student.training.student import build_student, full_model


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Plain fine-tuning, without a cache."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-2,
        },
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0},
    }


@pytest.fixture
def distilling(tree: dict[str, Any], teacher_cache: Path) -> dict[str, Any]:
    return tree | {
        "teacher": teacher_of(teacher_cache),
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "loss": {"kd_ratio": 0.5},
    }


@pytest.mark.parametrize(
    ("family", "connector"),
    [
        ("qwen3_5", "visual.merger"),
        ("qwen2_5_vl", "visual.merger"),
        ("llava", "multi_modal_projector"),
        ("gemma3", "multi_modal_projector"),
        ("idefics3", "connector"),
        ("internvl", "multi_modal_projector"),
    ],
)
def test_every_parameter_of_a_family_belongs_to_a_part(family: str, connector: str) -> None:
    config = AutoConfig.for_model(family)
    config.get_text_config().pad_token_id = 0  # Transformers 5.17 has one of Idefics3 beyond its vocabulary
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parts = {
        name: {id(p) for module in modules for p in module.parameters()}
        for name, modules in find_parts(model).items()
    }
    assert set().union(*parts.values()) == {id(p) for p in model.parameters()}
    assert parts["connector"] == {id(p) for p in model.base_model.get_submodule(connector).parameters()}
    assert parts["vision"]
    assert parts["language"]
    assert not parts["vision"] & parts["language"]
    freeze(model, FreezeConfig(vision=True, audio=True))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == parts["language"] | parts["connector"]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "paddleocr_vl", "blip-2"])
def test_what_lies_in_no_part_belongs_to_the_connector(family: str) -> None:
    """``image_newline``, a query or a projector of an unknown name."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    inside = {
        id(p) for modules in find_parts(model).values() for module in modules for p in module.parameters()
    }
    apart = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert apart
    freeze(model, FreezeConfig(vision=True, language=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= set(apart)
    freeze(model, FreezeConfig(connector=True))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in apart)
    parts = parameters_of_parts(model)
    assert {id(p) for found in parts.values() for p in found} == {id(p) for p in model.parameters()}


def test_freezing_everything_is_refused(student_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student_folder)
    with pytest.raises(RecipeError, match="nothing is left to train"):
        freeze(model, FreezeConfig(vision=True, connector=True, language=True))


def test_a_part_that_should_be_there_but_is_not_found_is_an_error(student_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student_folder)
    model.base_model.eyes = model.base_model.visual
    del model.base_model.visual
    with pytest.raises(RecipeError, match=r"student\.freeze\.vision.*eyes"):
        freeze(model, FreezeConfig(vision=True))


def test_frozen_parameters_do_not_change_by_a_bit_and_have_no_moments(
    tree: dict[str, Any], student_folder: Path
) -> None:
    recipe = make_recipe(tree, student__freeze={"vision": True, "connector": True})
    run_alone(recipe)
    before = dict(AutoModelForImageTextToText.from_pretrained(student_folder).named_parameters())
    after = state_of(recipe, 3)
    for name, parameter in before.items():
        frozen = "visual" in name
        assert torch.equal(after[f"model.{name}"], parameter) == frozen, name
        assert (f"exp_avg.{name}" in after) != frozen


def test_validation_equals_transformers_own_logits_before_and_the_export_s_after(
    tree: dict[str, Any], student_folder: Path, processor: ExampleProcessor
) -> None:
    recipe = make_recipe(tree)
    run_alone(recipe)
    first, last = validation_records(recipe)
    split = open_split(recipe.data, "validation")
    for folder, record in ((student_folder, first), (recipe.run.path / "export", last)):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        total, count = 0.0, 0
        for example in split:
            one = processor.encode(example)
            with torch.no_grad():
                logits = model(**processor.collate([one]).inputs).logits[0, -one.num_positions - 1 : -1]
            total += cross_entropy(logits, one.answer_ids, reduction="sum").item()
            count += one.num_positions
        assert record["num_positions"] == count
        assert record["ce_loss"] == pytest.approx(total / count, rel=1e-5)
        assert record["kd_loss"] is None


def test_the_export_holds_the_trained_weights_and_opens_as_a_processor(
    tree: dict[str, Any], student_folder: Path
) -> None:
    recipe = make_recipe(tree)
    run_alone(recipe)
    trained = state_of(recipe, 3)
    exported = AutoModelForImageTextToText.from_pretrained(recipe.run.path / "export")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, trained[f"model.{name}"])
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        assert (recipe.run.path / "export" / name).read_bytes() == (student_folder / name).read_bytes()


def test_checkpointed_activations_change_memory_only(distilling: dict[str, Any]) -> None:
    kept, recomputed = make_recipe(distilling), make_recipe(distilling, run__name="recomputed")
    recomputed = make_recipe(distilling, run__name="recomputed", student__activation_checkpointing=True)
    run_alone(kept)
    run_alone(recomputed)
    assert step_records(recomputed) == step_records(kept)


def test_bf16_compute_stays_near_fp32(distilling: dict[str, Any]) -> None:
    exact, rounded = make_recipe(distilling), make_recipe(distilling, run__name="bf16")
    rounded = make_recipe(distilling, run__name="bf16", student__compute_dtype="bfloat16")
    run_alone(exact)
    run_alone(rounded)
    for mine, other in zip(step_records(rounded), step_records(exact), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert {tensor.dtype for tensor in state_of(rounded, 3).values()} == {torch.float32}


@pytest.mark.parametrize(("kd_ratio", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_the_loss_is_the_mixture_that_the_recipe_names(
    distilling: dict[str, Any], kd_ratio: float, temperature: float
) -> None:
    recipe = make_recipe(distilling, loss__kd_ratio=kd_ratio, loss__temperature=temperature)
    run_alone(recipe)
    for record in step_records(recipe) + validation_records(recipe):
        mixed = (1 - kd_ratio) * record["ce_loss"] + kd_ratio * record["kd_loss"]
        assert record["loss"] == pytest.approx(mixed, rel=1e-6)
    first, last = validation_records(recipe)
    assert last["loss"] < first["loss"]


def test_random_weights_do_not_depend_on_the_number_of_ranks(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, student__init="random", run__seed=5)
    expected = dict(full_model(recipe.student, seed=5).named_parameters())

    def weights(world: Any) -> dict[str, torch.Tensor]:
        student = build_student(recipe, world, num_token_ids=300)
        return {name: p.full_tensor().detach().clone() for name, p in student.model.named_parameters()}

    for found in on_ranks(2, weights):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_student_moves(
    tree: dict[str, Any], num_ranks: int
) -> None:
    recipe = make_recipe(
        tree, optimization__learning_rate=1e30, optimization__max_grad_norm=None, run__checkpoint_every=1
    )
    with pytest.raises(TrainingError, match=r"step 2: the loss is .*max_skipped_steps allows 0"):
        run_ranks(recipe, num_ranks)
    checkpoints = {path.name for path in (recipe.run.path / "checkpoints").iterdir()}
    assert checkpoints == {"step-000001", "latest"}


def test_steps_that_are_not_finite_may_be_left_out_and_are_counted(tree: dict[str, Any]) -> None:
    recipe = make_recipe(
        tree,
        optimization__learning_rate=1e30,
        optimization__max_grad_norm=None,
        optimization__max_skipped_steps=2,
        run__checkpoint_every=1,
        run__export=True,
    )
    with pytest.raises(
        TrainingError, match=r"step 3: the validation loss is not a number.*Nothing is exported"
    ):
        run_alone(recipe)
    assert not (recipe.run.path / "export").exists()
    first, last = state_of(recipe, 2), state_of(recipe, 3)
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_frozen_tower_runs_without_autograd(tree: dict[str, Any]) -> None:
    """What enters the language model has no graph behind it, so nothing of the tower is kept for a backward."""

    def graphs(world: World) -> tuple[bool, bool]:
        recipe = make_recipe(tree, student__freeze={"vision": True, "connector": True})
        inputs = open_inputs(recipe, world)
        student = build_student(recipe, world, num_token_ids=inputs.processor.num_token_ids)
        seen: list[bool] = []
        (tower,) = find_parts(student.model)["vision"]
        for module in tower.modules():
            module.register_forward_hook(lambda _, __, output: seen.append(_has_graph(output)))
        microbatch = inputs.training_source()[Slot(0, (0, 1))]
        loss = student(microbatch.inputs, microbatch.position_index, microbatch.labels, None).losses.loss
        loss.backward()
        assert len(seen) > 3
        return any(seen), loss.requires_grad

    assert on_ranks(1, graphs) == [(False, True)]


def _has_graph(output: Any) -> bool:
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    )
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def test_a_student_that_changes_its_logits_is_refused_before_the_first_step(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks, sharded: the check sees what the model really does."""
    original = Qwen3_5ForConditionalGeneration.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(Qwen3_5ForConditionalGeneration, "forward", changed)
    recipe = make_recipe(tree)
    with pytest.raises(RecipeError, match="its logits differ"):
        run_ranks(recipe, 2)
    assert step_records(recipe) == []


@pytest.mark.slow
def test_compiled_layers_change_losses_by_rounding_only(distilling: dict[str, Any]) -> None:
    """With the backend that traces like the default one, but writes no code, which takes minutes on a CPU.

    By hand with ``inductor``: losses within 1e-6, and 219 s for three steps.
    """
    plain = make_recipe(distilling, run__name="plain")
    compiled = make_recipe(distilling, student__compile=True, student__compile_backend="eager")
    assert run_alone(plain) == 0
    assert run_alone(compiled) == 0
    assert dynamo_counters["frames"]["ok"] > 0
    for ours, theirs in zip(step_records(compiled), step_records(plain), strict=True):
        assert {**ours, "event": 0} == pytest.approx({**theirs, "event": 0}, rel=2e-5)
    assert state_of(compiled, 3).keys() == state_of(plain, 3).keys()


def test_an_unknown_compiler_is_refused(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, student__compile=True, student__compile_backend="inducktor")
    with pytest.raises(RecipeError, match="compile_backend 'inducktor' is none of torch's"):
        run_alone(recipe)


def test_parameters_may_be_bf16_themselves(distilling: dict[str, Any]) -> None:
    """Half of the memory of weights and moments; the loss still falls, and a resume is exact."""
    settings = {
        "student__param_dtype": "bfloat16",
        "student__compute_dtype": "bfloat16",
        "optimization__max_steps": 6,
        "optimization__schedule": "constant",
    }
    unbroken = make_recipe(distilling, **settings)
    assert run_ranks(unbroken, 2) == [0, 0]
    state = state_of(unbroken, 6)
    assert {tensor.dtype for name, tensor in state.items() if "lm_head" in name or "proj" in name} == {
        torch.bfloat16
    }
    first, last = validation_records(unbroken)[0], validation_records(unbroken)[-1]
    assert last["loss"] < first["loss"]
    begun = make_recipe(distilling, **settings | {"run__name": "begun", "optimization__max_steps": 3})
    resumed = make_recipe(distilling, **settings, run__name="begun")
    run_ranks(begun, 2)
    run_ranks(resumed, 2, resume=True)
    assert step_records(resumed) == step_records(unbroken)


def test_another_family_is_trained_and_exported(tree: dict[str, Any], llava_folder: Path) -> None:
    """A LLaVA with a head wider than its tokenizer, from its configuration alone, vision frozen, on two ranks."""
    recipe = make_recipe(
        tree, student__model=str(llava_folder), student__init="random", student__freeze={"vision": True}
    )
    assert run_ranks(recipe, 2) == [0, 0]
    first, last = validation_records(recipe)[0], validation_records(recipe)[-1]
    assert last["loss"] < first["loss"]
    exported = AutoModelForImageTextToText.from_pretrained(recipe.run.path / "export", dtype=torch.float32)
    trained = state_of(recipe, 3)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, trained[f"model.{name}"]), name
