"""Mixtures of experts: the router's loss is Transformers' own, and adapters reach the experts when they are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from stage2_runs import make_recipe, on_ranks, records, run_alone, run_ranks, step_records
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from shared.data.collation import Batch
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.models.router import RouterLoss
from shared.models.vlm import load_vlm
from shared.runtime import World
from stage2_student.__main__ import commands
from stage2_student.check import check_recipe
from stage2_student.training.inputs import open_inputs
from stage2_student.training.order import Slot
from stage2_student.training.student import build_student

COEFFICIENT = 0.05


BOTH = pytest.mark.parametrize("moe_folder", ["qwen3_vl_moe", "qwen3_5_moe"], indirect=True)


@pytest.fixture(scope="module")
def moe_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, student_folder: Path
) -> Path:
    """A Qwen3-VL, or of the other family, of four experts in each of two layers, that asks for the router's loss."""
    folder = tmp_path_factory.mktemp("moe") / "moe"
    shutil.copytree(student_folder, folder)
    (folder / "model.safetensors").unlink()
    plain = AutoConfig.from_pretrained(student_folder)
    config = AutoConfig.for_model(
        **MODELS[getattr(request, "param", "qwen3_vl_moe")](plain),
        **{name: getattr(plain, name) for name in ("image_token_id", "video_token_id")},
        **{name: getattr(plain, name) for name in ("vision_start_token_id", "vision_end_token_id")},
        dtype="float32",
    )
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "experts" in name:
                parameter.normal_(0, 0.1)  # the router's are zero at first, and its experts then all alike
    model.generation_config = GenerationConfig.from_pretrained(student_folder)
    model.save_pretrained(folder)
    return folder


def text_config(plain: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": plain.text_config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "output_router_logits": True,
        "router_aux_loss_coef": COEFFICIENT,
        **more,
    }


def vision_config(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "initializer_range": 0.1,
        **more,
    }


def qwen3_vl_moe(plain: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return {
        "model_type": "qwen3_vl_moe",
        "text_config": text_config(plain, rope_parameters=rope),
        "vision_config": vision_config(deepstack_visual_indexes=[0]),
    }


def qwen3_5_moe(plain: Any) -> dict[str, Any]:
    """With an expert that all tokens share, and linear attention in one of the layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    rope |= {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    layers = ["linear_attention", "full_attention"]
    text = text_config(plain, rope_parameters=rope, layer_types=layers, shared_expert_intermediate_size=16)
    return {
        "model_type": "qwen3_5_moe",
        "text_config": text | linear,
        "vision_config": vision_config(),
    }


MODELS = {"qwen3_vl_moe": qwen3_vl_moe, "qwen3_5_moe": qwen3_5_moe}


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, moe_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64, "limit": 7},
        "student": {"model": str(moe_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0, "chunk_size": 16},
        "optimization": {"global_batch_size": 4, "microbatch_size": 4, "max_steps": 3, "learning_rate": 1e-2},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0, "export": False},
    }


def whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@BOTH
def test_loss_and_gradient_are_those_of_the_model_s_own_forward(
    tree: dict[str, Any], moe_folder: Path, processor: ExampleProcessor
) -> None:
    """Of one microbatch with padding, which does not count."""

    def of_ours(world: World) -> tuple[float, float, dict[str, torch.Tensor]]:
        recipe = make_recipe(tree)
        source = open_inputs(recipe, world).training_source()
        student = build_student(recipe, world, num_token_ids=processor.num_token_ids)
        one = source[Slot(0, (0, 1, 2))]
        losses, router = student(one.inputs, one.position_index, one.labels, None, one.num_rows)
        assert router is not None
        loss = losses.loss / one.num_positions + COEFFICIENT * router / one.num_tokens
        loss.backward()
        grads = {
            name: p.grad.full_tensor() for name, p in student.model.named_parameters() if p.grad is not None
        }
        return loss.item(), router.item() / one.num_tokens, grads

    ((loss, router, grads),) = on_ranks(1, of_ours)
    model = whole(moe_folder)
    rows = [processor.encode(example) for example in split_rows(tree)[:3]]
    batch = processor.collate(rows)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels.flatten()[batch.position_index + 1] = batch.labels
    own = model(**batch.inputs, labels=labels, use_cache=False, output_router_logits=True)
    own.loss.backward()
    assert router == pytest.approx(own.aux_loss.item(), rel=1e-5)
    assert loss == pytest.approx(own.loss.item(), rel=1e-5)
    assert 0.9 < router < 4
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def split_rows(tree: dict[str, Any]) -> list[Example]:
    from shared.data.rows import open_split

    return list(open_split(make_recipe(tree).data, "train"))


@BOTH
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"lora": {"rank": 4}}])
def test_it_is_part_of_the_loss_and_reported_apart(tree: dict[str, Any], settings: dict[str, Any]) -> None:
    recipe = make_recipe(tree, **{f"student__{name}": value for name, value in settings.items()})
    assert run_alone(recipe) == 0
    logged = [one for one in records(recipe) if one["event"] in ("step", "validation")]
    assert len(logged) == 5
    for record in logged:
        expected = record["ce_loss"] + COEFFICIENT * record["router_loss"]
        assert record["loss"] == pytest.approx(expected, rel=1e-6)


@BOTH
def test_ranks_weigh_it_by_their_tokens(tree: dict[str, Any]) -> None:
    """Alike for the same microbatches, on one rank after the other or on two; the last step has too few rows."""
    one = make_recipe(tree, run__name="one", optimization__microbatch_size=1)
    two = make_recipe(tree, run__name="two", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    for ours, theirs in zip(router_losses(two), router_losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(step_records(two), step_records(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_blank_picture_does_not_count(tree: dict[str, Any], mixed_folder: Path) -> None:
    """On two ranks each row of text has one beside it, on one rank none: the router's loss is the same."""
    tree["data"] |= {"source": str(mixed_folder)}
    one = make_recipe(tree, run__name="one", optimization__microbatch_size=1)
    two = make_recipe(tree, run__name="two", optimization__microbatch_size=1)
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    for ours, theirs in zip(router_losses(two), router_losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def router_losses(recipe: Any) -> list[float]:
    return [one["router_loss"] for one in records(recipe) if "router_loss" in one]


def test_none_where_the_configuration_does_not_ask(
    tree: dict[str, Any], moe_folder: Path, tmp_path: Path, student_folder: Path
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(moe_folder, silent)
    config = json.loads((silent / "config.json").read_text())
    config["text_config"]["output_router_logits"] = False
    (silent / "config.json").write_text(json.dumps(config))
    assert RouterLoss.of(whole(silent)) is None
    assert RouterLoss.of(whole(student_folder)) is None
    recipe = make_recipe(tree, student__model=str(silent), optimization__max_steps=1)
    assert run_alone(recipe) == 0
    assert router_losses(recipe) == []


def test_another_loss_than_the_model_s_own_is_refused(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Qwen3VLMoeForConditionalGeneration.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if output.aux_loss is not None:
            output.aux_loss = output.aux_loss * 2
        return output

    monkeypatch.setattr(Qwen3VLMoeForConditionalGeneration, "forward", changed)
    with pytest.raises(RecipeError, match="load-balancing loss of its router is"):
        run_alone(make_recipe(tree))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@BOTH
def test_adapters_reach_experts_that_are_named(
    tree: dict[str, Any], tmp_path: Path, moe_folder: Path, processor: ExampleProcessor
) -> None:
    """On two ranks; the adapter, opened by peft, and the merged model answer alike, and not as before."""
    lora = {"rank": 4, "alpha": 8.0, "target_parameters": EXPERTS}
    one = make_recipe(tree, student__lora=lora, run__export=True, optimization__microbatch_size=1)
    two = make_recipe(
        tree, student__lora=lora, run__name="two", run__export=True, optimization__microbatch_size=1
    )
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    for ours, theirs in zip(step_records(two), step_records(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    export = two.run.path / "export"
    adapted = set(load_file(export / "adapter_model.safetensors"))
    assert sum("experts" in name for name in adapted) == 2 * 2 * 2  # layers, parameters, factors
    merged = tmp_path / "merged"
    result = CliRunner().invoke(commands, ["export", str(two.run.path), "--merge", "--out", str(merged)])
    assert result.exit_code == 0, result.output
    batch = processor.collate([processor.encode(example) for example in split_rows(tree)[:3]])
    with_adapter = peft.PeftModel.from_pretrained(whole(moe_folder), str(export))
    torch.testing.assert_close(
        logits(whole(merged), batch), logits(with_adapter, batch), rtol=1e-4, atol=1e-4
    )
    opened = load_vlm(str(export), revision=None, dtype=torch.float32, attn_implementation=None)
    torch.testing.assert_close(logits(opened, batch), logits(with_adapter, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(opened, batch), logits(whole(moe_folder), batch), atol=1e-2)


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    return model.eval()(**batch.inputs, use_cache=False).logits


def test_parameters_that_are_not_there_are_refused(tree: dict[str, Any]) -> None:
    lora = {"rank": 4, "target_parameters": ["experts.up_proj"]}
    with pytest.raises(RecipeError, match=r"'experts.up_proj' is no matrix .*mlp\.experts\.gate_up_proj"):
        run_alone(make_recipe(tree, student__lora=lora))
    with pytest.raises(RecipeError, match="dropout beside target_parameters"):
        make_recipe(tree, student__lora={"target_parameters": EXPERTS, "dropout": 0.1})


def test_what_adapters_do_not_reach_is_told(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """By ``check`` and at the start; nothing about experts that are named, and of the router that takes part."""
    lora = {"rank": 4}
    missed = r"mlp\.experts\.gate_up_proj \(8,192 parameters\), mlp\.experts\.down_proj \(4,096 parameters\)"
    told = "\n".join(
        value for _, value in check_recipe(make_recipe(tree, student__lora=lora), num_ranks=1).facts
    )
    assert re.search(missed, told)
    assert "load-balancing loss counts 0.05 times" in told
    assert run_alone(make_recipe(tree, student__lora=lora, optimization__max_steps=1)) == 0
    assert re.search(f"note: lora reaches linear layers.*{missed}", capsys.readouterr().out)
    named = lora | {"target_parameters": EXPERTS}
    told = "\n".join(
        value for _, value in check_recipe(make_recipe(tree, student__lora=named), num_ranks=1).facts
    )
    assert "target_parameters" not in told


def test_master_weights_that_lose_updates_are_told(tree: dict[str, Any], student_folder: Path) -> None:
    """The numbers are right: at this learning rate half of usual weights stand still."""
    settings = {"student__model": str(student_folder), "student__param_dtype": "bfloat16"}
    small = make_recipe(tree, **settings, optimization__learning_rate=5e-5)
    (note,) = [value for _, value in check_recipe(small, num_ranks=1).facts if "loses updates" in value]
    assert "above 0.013 to 0.026" in note
    large = make_recipe(tree, **settings, optimization__learning_rate=1e-2)
    assert not [value for _, value in check_recipe(large, num_ranks=1).facts if "loses updates" in value]
    weights = torch.linspace(0.001, 0.1, 1000).bfloat16()
    stand_still = (weights - 5e-5) == weights
    assert not stand_still[weights < 0.0127].any()
    assert stand_still[weights > 0.0257].all()
