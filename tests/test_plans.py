"""Tensor and expert parallelism of every family: losses and all gradients are those of one process."""

from __future__ import annotations

import importlib.util
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_family
from samples import ANSWERS, QUESTIONS, encoded_picture
from stage2_runs import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shared.data.collation import Batch
from shared.data.processing import open_processor
from shared.data.rows import Example
from shared.kd_loss import fused_ce_kd
from shared.models.plans import apply_plan, plan_of
from shared.models.sharding import fill
from shared.models.vlm import empty_vlm, last_hidden_states, load_config, load_vlm, split
from shared.recipes import DataConfig
from shared.runtime import World

NEED_TORCHVISION = {"llama4", "mistral3", "pixtral"}
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe")
LARGE_GEMMA = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
TEXT: dict[str, dict[str, Any]] = {"gemma4": LARGE_GEMMA}
CASES = {
    **{name: {"tensor": 2, "expert": 1} for name in FAMILIES},
    **{f"{name} experts": {"tensor": 1, "expert": 2} for name in EXPERTS},
    **{f"{name} both": {"tensor": 2, "expert": 2} for name in EXPERTS},
}


def batch_of(folder: Path) -> Batch:
    """Pictures of two sizes, and answers of different lengths."""
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
    for _ in range(2):
        hidden_ND = last_hidden_states(body, batch.inputs).flatten(0, 1)[batch.position_index]
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
    folder: Path, source: PreTrainedModel, world: World, sizes: dict[str, int]
) -> PreTrainedModel:
    model = empty_vlm(load_config(str(folder)), dtype=torch.float32, attn_implementation=None)
    mesh = init_device_mesh("cpu", (world.size,))
    apply_plan(model, plan_of(model, section="teacher", **sizes), mesh)
    model.to_empty(device="cpu")
    model.tie_weights()
    fill(model, source if world.is_main else None, world)
    return model.eval()


def worst_difference(world: World, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    source = load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
    batch = batch_of(folder)
    loss, wanted = loss_and_gradients(source, batch)
    source.zero_grad()
    model = split_model(folder, source, world, sizes)
    got, gradients = loss_and_gradients(model, batch)
    assert gradients.keys() == wanted.keys()
    largest = max(grad.norm().item() for grad in wanted.values())
    off = {  # where a gradient is zero but for rounding, as of a bias of keys, there is nothing to compare with
        name: ((gradients[name] - want).norm() / (want.norm() + 1e-5 * largest)).item()
        for name, want in wanted.items()
    }
    worst = max(off, key=off.__getitem__)
    total = sum(p.numel() for p in source.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    return {"loss": abs(got - loss) / loss, "worst": worst, "off": off[worst], "held": held / total}


def all_cases(world: World, folders: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, sizes in CASES.items():
        folder = folders.get(case.split()[0])
        if folder is not None:
            try:
                found[case] = worst_difference(world, folder, sizes)
            except Exception:
                found[case] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every case, from one pair of processes: to start them takes longer than they do."""
    root = tmp_path_factory.mktemp("families")
    folders = {
        name: make_family(name, root / name, num_key_value_heads=2, **TEXT.get(name, {}))
        for name in FAMILIES
        if HAS_TORCHVISION or name not in NEED_TORCHVISION
    }
    return on_ranks(2, partial(all_cases, folders=folders))[0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one_process(case: str, differences: dict[str, Any]) -> None:
    if case not in differences:
        pytest.skip("needs torchvision")
    found = differences[case]
    assert isinstance(found, dict), found
    assert found["loss"] < 1e-5, found
    assert found["off"] < 1e-3, found
