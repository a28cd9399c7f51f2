"""Tensor and expert parallelism of every family: losses and all gradients are those of one process."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT
from families import FAMILIES, MISSING, make_family, stir
from samples import ANSWERS, QUESTIONS, encoded_picture
from stage2_runs import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from shared.data.collation import Batch
from shared.data.processing import open_processor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.kd_loss import fused_ce_kd
from shared.models import plans
from shared.models.plans import Plan, apply_plan, has_plans, plan_of
from shared.models.sharding import fill, move_buffers
from shared.models.vlm import empty_vlm, in_dtype_of, last_hidden_states, load_config, load_vlm, split
from shared.recipes import DataConfig, StudentConfig
from shared.runtime import World, distributed
from stage2_student.training.student import empty_model

pytestmark = pytest.mark.skipif(not has_plans(), reason="needs a newer transformers")

MODELS = ROOT / "docs" / "models.md"
TEXT: dict[str, dict[str, Any]] = {
    "gemma4": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},  # as its large models
    "gemma4 experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "odd": {"vocab_size": 511},
}
TENSOR_2, EXPERT_2, BOTH_2 = (
    {"tensor": tensor, "expert": expert} for tensor, expert in ((2, 1), (1, 2), (2, 2))
)
WITH_EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe", "gemma4")
CASES = {
    **dict.fromkeys(FAMILIES, TENSOR_2),
    **{f"{name} experts": EXPERT_2 for name in WITH_EXPERTS},
    **{f"{name} both, experts": BOTH_2 for name in WITH_EXPERTS},
    "qwen3_vl odd": TENSOR_2,  # a head of its own, and a tied one: 511 ids over two ranks
    "gemma3 odd": TENSOR_2,
}


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 511,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
MOE = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
HALVES = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
GLM = {"rope_parameters": SMALL["rope_parameters"] | {"mrope_section": [2, 1, 1]}}
PADDLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # text models of families that have no small model here
    "cohere2": ("aya_vision", {}),
    "exaone4": ("exaone4_5", HALVES),
    "gemma": ("paligemma", {"model_type": "gemma"}),
    "glm4v_text": ("glm4v", GLM),
    "paddleocr_vl_text": ("paddleocr_vl", PADDLE),
    "qwen3": ("llava", {"model_type": "qwen3"}),
    "aria_text": ("aria", MOE),
    "deepseek_v3": ("kimi_k25", MOE | LATENT | {"head_dim": 8, "num_key_value_heads": 4}),
    "glm4v_moe_text": ("glm4v_moe", GLM | MOE),
}
OTHER_CASES = {
    **dict.fromkeys(OTHERS, TENSOR_2),
    **{
        f"{name} experts": EXPERT_2
        for name, (_, settings) in OTHERS.items()
        if MOE.items() <= settings.items()
    },
}


def other_config(kind: str) -> PretrainedConfig:
    family, settings = OTHERS[kind]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "depth": 1, "num_heads": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 32}
    text = {"model_type": kind} | SMALL | settings
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, dtype="float32")


def text_of(case: str) -> dict[str, Any]:
    """Settings of the text model: heads that two ranks can share, grouped where the family allows it."""
    family, *more = case.split()
    settings = {"num_key_value_heads": 2, **TEXT.get(family, {})}
    if "head_dim" in FAMILIES[family].config(8, lambda token: 0)["text_config"]:
        settings["num_attention_heads"] = 4
    for name in more:
        settings |= TEXT.get(f"{family} {name}", {}) | TEXT.get(name, {})
    return settings


def batch_of_text() -> Batch:
    ids = torch.arange(10, 42).view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places = torch.tensor([8, 9, 10, 28, 29])
    return Batch(inputs, places, ids.flatten()[places + 1], torch.tensor([0, 3, 5]), [b"", b""])


def batch_of(folder: Path) -> Batch:
    """Pictures of two sizes, and answers of different lengths; text where the family's pictures need torchvision."""
    if folder.name.split()[0] in MISSING:
        return batch_of_text()
    processor = open_processor(str(folder), DataConfig(source="unused", max_answer_tokens=64))
    rows = [
        Example.single(
            image=encoded_picture(index, size=((40, 48), (90, 31))[index]),
            question=QUESTIONS[index],
            answer=ANSWERS[index],
            kind="",
            case="",
            index=index,
        )
        for index in range(2)
    ]
    return processor.collate([processor.encode(row) for row in rows])


def loss_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Of two microbatches of the same rows, whose gradients add up."""
    body, head = split(model)
    inputs = in_dtype_of(head, batch.inputs)
    for _ in range(2):
        hidden_ND = last_hidden_states(body, inputs).flatten(0, 1)[batch.position_index]
        sums = fused_ce_kd(
            hidden_ND * head.scale,
            head.weight_VD,
            batch.labels,
            kd_ratio=0.0,
            softcap=head.softcap,
            chunk_size=8,
        )
        (sums.loss / len(batch.labels)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums.loss.item(), {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()
    }


def split_model(
    config: PretrainedConfig, source: PreTrainedModel, world: World, sizes: dict[str, int]
) -> PreTrainedModel:
    model = empty_vlm(config, dtype=torch.float32, attn_implementation=None)
    mesh = init_device_mesh("cpu", (world.size,))
    plan = plan_of(model, section="teacher", **sizes)
    num_all, num_split = sum(p.numel() for p in model.parameters()), plan.num_split(model)
    apply_plan(model, plan, mesh)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    assert (
        abs(held - (num_all - num_split * (1 - 1 / world.size)))
        <= 2 * model.config.get_text_config().hidden_size
    )
    assert num_split > 0.05 * num_all
    model.to_empty(device="cpu")
    model.tie_weights()
    fill(model, source if world.is_main else None, world)
    return model.eval()


def of_family(world: World, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    source = load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
    return worst_difference(world, load_config(str(folder)), source, batch_of(folder), sizes)


def of_other(world: World, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
    config = other_config(kind)
    torch.manual_seed(3)
    source = AutoModelForImageTextToText.from_config(config).eval()
    stir(source)
    return worst_difference(world, config, source, batch_of_text(), sizes)


def worst_difference(
    world: World, config: PretrainedConfig, source: PreTrainedModel, batch: Batch, sizes: dict[str, int]
) -> dict[str, Any]:
    loss, wanted = loss_and_gradients(source, batch)
    source.zero_grad()
    model = split_model(config, source, world, sizes)
    got, gradients = loss_and_gradients(model, batch)
    assert gradients.keys() == wanted.keys()
    largest = max(grad.norm().item() for grad in wanted.values())
    off = {  # where a gradient is zero but for rounding, as of a bias of keys, there is nothing to compare with
        name: ((gradients[name] - want).norm() / (want.norm() + 1e-5 * largest)).item()
        for name, want in wanted.items()
    }
    worst = max(off, key=off.__getitem__)
    return {"loss": abs(got - loss) / loss, "worst": worst, "off": off[worst]}


def all_cases(world: World, folders: dict[str, Path]) -> dict[str, Any]:
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        case: partial(of_family, world, folder, CASES[case]) for case, folder in folders.items()
    }
    jobs |= {case: partial(of_other, world, case.split()[0], sizes) for case, sizes in OTHER_CASES.items()}
    found: dict[str, Any] = {}
    for case, job in jobs.items():
        try:
            found[case] = job()
        except Exception:
            found[case] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every case, from one pair of processes: to start them takes longer than they do."""
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}
    folders = {}
    for case in CASES:
        family, settings = case.split()[0], text_of(case)
        kind = f"{family} {settings}"
        made[kind] = made.get(kind) or make_family(family, root / f"{family} {len(made)}", **settings)
        folders[case] = made[kind]
    return on_ranks(2, partial(all_cases, folders=folders), collective_timeout_s=60)[0]


@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES])
def test_two_ranks_have_the_gradients_of_one_process(case: str, differences: dict[str, Any]) -> None:
    found = differences[case]
    if "later is needed to split each expert" in str(found):
        pytest.skip("needs a newer torch")
    assert isinstance(found, dict), found
    assert found["loss"] < 1e-5, found
    assert found["off"] < 1e-3, found  # where a sum is missing, half of it


def test_the_table_in_the_documentation_is_what_holds(differences: dict[str, Any]) -> None:
    lines = MODELS.read_text().splitlines()
    for name, family in FAMILIES.items():
        experts = "yes" if name in WITH_EXPERTS else "refused" if name == "llama4" else "-"
        assert f"| {family.title} | yes | {experts} |" in lines


def test_what_is_taken_for_right_is_tested() -> None:
    settings = [FAMILIES[name].config(8, lambda token: 0) for name in FAMILIES]
    kinds = {AutoConfig.for_model(**one).get_text_config().model_type for one in settings}
    assert kinds | OTHERS.keys() == plans.TENSOR
    of_experts = {
        AutoConfig.for_model(**FAMILIES[name].config(8, lambda token: 0)).get_text_config().model_type
        for name in WITH_EXPERTS
    }
    assert of_experts | {case.split()[0] for case in OTHER_CASES if "experts" in case} == plans.EXPERT
    text = " ".join(MODELS.read_text().split())
    named = re.search(r"The text models (.*?), too", text)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == OTHERS.keys()


def empty(family: str, folder: Path, **text: Any) -> PreTrainedModel:
    config = load_config(str(make_family(family, folder, **text)))
    return empty_vlm(config, dtype=torch.float32, attn_implementation=None)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("qwen3_vl", TENSOR_2, r"teacher.tensor 2: .*k_proj.weight has 1 heads, .* Choose one of 1$"),
        ("gemma4", TENSOR_2, "hidden_size_per_layer_input"),
        ("llava", EXPERT_2, "teacher.expert 2: no plan of expert parallelism for LlavaFor"),
        ("llama4", EXPERT_2, "teacher.expert 2: no plan of expert parallelism for Llama4"),
        (
            "qwen3_5_moe",
            {"tensor": 1, "expert": 3},
            r"has 4 experts, which 3 ranks .* Choose one of 1, 2, 4$",
        ),
        ("qwen3_5_moe", {"tensor": 2, "expert": 4}, "they are the same ranks, so they must be equal"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, family: str, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(empty(family, tmp_path / family), section="teacher", **sizes)


def test_other_text_models_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers has a plan for this one, whose norms go over all heads."""
    monkeypatch.setitem(OTHERS, "olmo2", ("llava", {}))
    model = empty_vlm(other_config("olmo2"), dtype=torch.float32, attn_implementation=None)
    with pytest.raises(RecipeError, match=r"no plan of tensor parallelism for LlavaFor.* 'olmo2' is known"):
        plan_of(model, section="parallel", **TENSOR_2)


def test_older_packages_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty("llava", tmp_path / "llava", num_key_value_heads=2)
    versions = {"transformers": "5.17.0", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(plans, "version", versions.__getitem__)
    with pytest.raises(
        RecipeError, match=r"teacher.tensor: transformers 5.17.0 found, 5.23 or later is needed"
    ):
        plan_of(model, section="teacher", **TENSOR_2)
    assert plan_of(model, section="teacher", tensor=1, expert=1) == Plan()
    versions["transformers"] = "5.23.0"
    assert plan_of(model, section="teacher", **TENSOR_2).tensor
    experts = empty("qwen3_5_moe", tmp_path / "moe", num_key_value_heads=2)
    with pytest.raises(RecipeError, match=r"torch 2.11.0\+cu130 found, 2.13 or later .*: teacher.expert 2$"):
        plan_of(experts, section="teacher", **TENSOR_2)
    assert plan_of(experts, section="teacher", **BOTH_2).expert


def test_towers_and_connector_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 and Gemma 4 have plans for their towers, too."""
    monkeypatch.setattr(plans, "NEEDED_FOR_PACKED", (0, 0))
    for family in ("llama4", "gemma4"):
        model = empty(family, tmp_path / family, **text_of(family))
        plan = plan_of(model, section="teacher", **TENSOR_2)
        inside = ("language_model.", "model.language_model.", "lm_head")
        assert plan.tensor
        assert all(name.startswith(inside) for name in plan.tensor)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4v_moe_text"])
def test_what_is_kept_in_fp32_is_so_where_ranks_share_a_model(kind: str, tmp_path: Path) -> None:
    """In bf16 these corrections of a router are all 5, and other experts would be chosen."""
    whole = AutoModelForImageTextToText.from_config(other_config(kind))
    name = next(name for name in whole.state_dict() if name.endswith("e_score_correction_bias"))
    correction = whole.get_buffer(name).copy_(torch.tensor([5.01, 5.0, 4.995, 5.005]))
    whole.save_pretrained(tmp_path)
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": None}
    source = load_vlm(str(tmp_path), revision=None, **bf16)
    shared = empty_vlm(load_config(str(tmp_path)), **bf16)
    student = empty_model(load_config(str(tmp_path)), StudentConfig(model="student", param_dtype="bfloat16"))
    for model in (shared, student):
        model.to_empty(device="cpu")
        model.tie_weights()
        with distributed(device="cpu") as world:
            fill(model, source, world)
        assert torch.equal(model.get_buffer(name), correction)
    assert {n: t.dtype for n, t in shared.state_dict().items()} == {
        n: t.dtype for n, t in source.state_dict().items()
    }
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}  # as FSDP2 asks for


def test_buffers_move_where_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].register_buffer("table", torch.ones(2), persistent=False)
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert "1.table" not in model.state_dict()
