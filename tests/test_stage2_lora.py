"""Adapters are trained alone, alike on any number of ranks, and leave as an adapter or as a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from stage2_runs import (
    assert_same_state,
    make_recipe,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    teacher_of,
    validation_records,
)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from shared.data.collation import Batch
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.models.vlm import load_vlm
from shared.recipes import StudentConfig
from stage2_student.__main__ import commands
from stage2_student.training.student import choose_trained, empty_model


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_cache: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": teacher_of(teacher_cache),
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "student": {
            "model": str(student_folder),
            "compute_dtype": "float32",
            "lora": {"rank": 4, "alpha": 8.0},
        },
        "loss": {"kd_ratio": 0.5, "chunk_size": 16},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
        },
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0},
    }


@pytest.fixture
def batch(processor: ExampleProcessor, examples: list[Example]) -> Batch:
    return processor.collate([processor.encode(one) for one in examples[:3]])


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    return model.eval()(**batch.inputs, use_cache=False).logits


def test_adapters_alone_are_trained(tree: dict[str, Any], student_folder: Path) -> None:
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    state, base = state_of(recipe, 4), base_of(student_folder)
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    frozen = {name.replace(".base_layer.", "."): t for name, t in weights.items() if ".lora_" not in name}
    for name, tensor in base.named_parameters():
        assert torch.equal(frozen[name], tensor), name
    adapters = {name for name in weights if ".lora_" in name}
    assert {name.removeprefix("exp_avg.") for name in state if name.startswith("exp_avg.")} == adapters
    assert all(weights[name].any() for name in adapters)  # the zero factors have moved
    assert not any("visual" in name or "lm_head" in name for name in adapters)
    first, last = validation_records(recipe)[0], validation_records(recipe)[-1]
    assert last["loss"] < first["loss"]


def test_ranks_and_a_resume_change_nothing(tree: dict[str, Any]) -> None:
    one, two = make_recipe(tree, run__name="one"), make_recipe(tree, run__name="two")
    run_alone(one)
    run_ranks(two, 2)
    for ours, theirs in zip(step_records(two), step_records(one), strict=True):
        assert {**ours, "event": 0} == pytest.approx({**theirs, "event": 0}, rel=2e-5)
    constant = {"optimization__schedule": "constant"}
    unbroken = make_recipe(tree, run__name="unbroken", **constant)
    run_alone(unbroken)
    begun = make_recipe(tree, run__name="begun", optimization__max_steps=2, **constant)
    run_alone(begun)
    resumed = make_recipe(tree, run__name="begun", **constant)
    run_alone(resumed, resume=True)
    assert step_records(resumed) == step_records(unbroken)
    assert_same_state(state_of(resumed, 4), state_of(unbroken, 4))


def test_the_adapter_and_the_merged_model_answer_alike(
    tree: dict[str, Any], student_folder: Path, batch: Batch, tmp_path: Path
) -> None:
    recipe = make_recipe(tree)
    run_alone(recipe)
    export = recipe.run.path / "export"
    assert (export / "adapter_model.safetensors").exists()
    assert not list(export.glob("model*.safetensors"))
    assert ModelCard((export / "README.md").read_text()).data.library_name == "peft"
    with_adapter = peft.PeftModel.from_pretrained(base_of(student_folder), str(export))

    merged = tmp_path / "merged"
    command(str(recipe.run.path), "--merge", "--out", str(merged))
    assert not (merged / "adapter_config.json").exists()
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    base = base_of(student_folder)
    assert whole.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(whole, batch), logits(with_adapter, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(whole, batch), logits(base, batch), atol=1e-2)


def test_the_student_s_answers_are_those_of_its_adapter(
    tree: dict[str, Any], student_folder: Path, batch: Batch
) -> None:
    """The export is opened as any folder is: by ``evaluate``, and at the end of the run."""
    recipe = make_recipe(tree, evaluation__max_examples=2, evaluation__max_new_tokens=4)
    assert run_alone(recipe) == 0
    assert pq.read_table(recipe.run.path / "evaluation" / "validation.parquet").num_rows == 2
    opened = load_vlm(
        str(recipe.run.path / "export"), revision=None, dtype=torch.float32, attn_implementation=None
    )
    plainly = AutoModelForImageTextToText.from_pretrained(recipe.run.path / "export", dtype=torch.float32)
    torch.testing.assert_close(logits(opened, batch), logits(plainly, batch), rtol=1e-4, atol=1e-4)


def test_a_recipe_may_ask_for_the_merged_model(tree: dict[str, Any]) -> None:
    tree["student"]["lora"]["merge"] = True
    recipe = make_recipe(tree, optimization__max_steps=1)
    run_alone(recipe)
    export = recipe.run.path / "export"
    assert list(export.glob("model*.safetensors"))
    assert not (export / "adapter_config.json").exists()


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 32.0}], ids=["whole", "adapters"])
def test_a_student_that_begins_from_an_adapter(tree: dict[str, Any], lora: dict[str, Any] | None) -> None:
    """It leaves as a whole model that any tool opens, and nothing in it says otherwise."""
    first = make_recipe(tree, run__name="first")
    run_alone(first)
    recipe = make_recipe(
        tree, student__model=str(first.run.path / "export"), student__lora=lora, optimization__max_steps=1
    )
    run_alone(recipe)
    export = recipe.run.path / "export"
    assert not (export / "adapter_config.json").exists()
    assert (export / "tokenizer_config.json").exists()
    trained = state_of(recipe, 1)
    opened = dict(AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).named_parameters())
    for name, tensor in trained.items():
        if name.startswith("model.") and ".lora_" not in name:
            plain = name.removeprefix("model.")
            expected = tensor
            if ".base_layer." in name:
                place = name.replace("base_layer.weight", "lora_{}.default.weight")
                expected = tensor + 16.0 * trained[place.format("B")] @ trained[place.format("A")]
                plain = plain.replace(".base_layer.", ".")
            torch.testing.assert_close(opened[plain], expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_s_bare_folder_as_student(tree: dict[str, Any], tmp_path: Path) -> None:
    """As peft writes it: weights and settings alone."""
    first = make_recipe(tree, run__name="first")
    run_alone(first)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(first.run.path / "export" / name, bare)
    recipe = make_recipe(tree, student__model=str(bare), student__lora=None, optimization__max_steps=1)
    run_alone(recipe)
    shutil.rmtree(bare)
    AutoModelForImageTextToText.from_pretrained(recipe.run.path / "export")
    AutoTokenizer.from_pretrained(recipe.run.path / "export")


def test_targets_may_be_named_and_are_checked(tree: dict[str, Any]) -> None:
    tree["student"]["lora"]["target_modules"] = ["q_proj", "linear_fc1"]
    recipe = make_recipe(tree, optimization__max_steps=1, run__export=False)
    run_alone(recipe)
    adapted = {name.partition(".lora_A")[0] for name in state_of(recipe, 1) if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "linear_fc1"}
    recipe = make_recipe(
        tree, optimization__max_steps=1, student__freeze={"vision": True}, run__name="frozen tower"
    )
    run_alone(recipe)
    saved = load_file(recipe.run.path / "export" / "adapter_model.safetensors")
    assert {name.split(".")[-4] for name in saved if "visual" in name} == {"merger"}
    tree["student"]["lora"]["target_modules"] = ["q_prj"]
    with pytest.raises(RecipeError, match=r"'q_prj' is no linear layer.*q_proj"):
        run_alone(make_recipe(tree, run__name="other"))
    tree["student"]["lora"]["target_modules"] = ["q_proj", "lm_head"]
    with pytest.raises(
        RecipeError, match=r"'lm_head' is the head .* the loss reads the head's weight itself"
    ):
        run_alone(make_recipe(tree, run__name="head"))


@pytest.mark.parametrize("target", ["target_modules", "target_parameters"])
def test_a_frozen_part_gets_no_adapters(target: str) -> None:
    """Towers of LLaVA and others have layers of the language model's names."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = vision | {"vocab_size": 64}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    names = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["embed_tokens.weight"]}[target]

    def parts(freeze: dict[str, bool], targets: list[str]) -> set[str]:
        student = StudentConfig.model_validate(
            {
                "model": "student",
                "freeze": freeze,
                "lora": {"rank": 2, "target_modules": ["q_proj"], target: targets},
            }
        )
        model = empty_model(config, student)
        choose_trained(model, student, seed=0)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(".lora_" in name for name in trained)
        return {name.split(".")[1] for name in trained}

    assert parts({"vision": True}, names) == {"language_model"}
    assert parts({}, ["q_proj"] if target == "target_modules" else names) == {
        "language_model",
        "vision_tower",
    }
    alone = {"target_modules": "fc1", "target_parameters": "position_embedding.weight"}[target]
    with pytest.raises(
        RecipeError, match=f"{target}: '{alone}' lies in parts alone that student.freeze freezes"
    ):
        parts({"vision": True}, [*names, alone])


def test_adapters_in_a_frozen_language_model_are_a_contradiction(tree: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"freeze\.language beside lora"):
        make_recipe(tree, student__freeze={"language": True})


def test_a_run_without_adapters_has_nothing_to_merge(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, student__lora=None, optimization__max_steps=1, run__export=False)
    run_alone(recipe)
    result = CliRunner().invoke(commands, ["export", str(recipe.run.path), "--merge"])
    assert "no adapters to merge" in str(result.exception)


def base_of(folder: Path) -> PreTrainedModel:
    return load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)


def command(*arguments: str) -> None:
    result = CliRunner().invoke(commands, ["export", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
