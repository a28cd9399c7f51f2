"""Examples one behind the other in one row: the same numbers as apart, and refused where they would not be."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_family
from samples import ANSWERS, QUESTIONS, encoded_picture
from stage2_runs import make_recipe, records, run_alone, run_ranks, state_of
from torch import Tensor
from transformers import PreTrainedModel

from shared.data.collation import IGNORE_INDEX, Encoded, collated, packed
from shared.data.conversations import question_answer
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.model_check import check_model, two_examples
from shared.models import packing
from shared.models.packing import require_packing
from shared.models.vlm import in_dtype_of, last_hidden_states, load_vlm, split
from shared.recipes import DataConfig, LossConfig, Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.check import check_recipe
from stage2_student.training.student import StudentWithLoss, counted_tokens

CPU = torch.device("cpu")
LINEAR = {"qwen3_5", "qwen3_5_moe"}
NOT_KNOWN = {"gemma3", "gemma4", "paligemma", "mllama", "llama4"}
PACKED = sorted(FAMILIES.keys() - NOT_KNOWN - LINEAR)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("packed_families")
    return cache(lambda family: make_family(family, root / family))


def opened(folder: Path) -> PreTrainedModel:
    return load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)


def processor_of(folder: Path) -> ExampleProcessor:
    try:
        return open_processor(str(folder), DataConfig(source="unused", max_answer_tokens=64))
    except RecipeError as error:
        if "needs torchvision" in str(error):
            pytest.skip("needs torchvision")
        raise


def encoded_rows(processor: ExampleProcessor) -> list[Encoded]:
    """A picture, a larger one, text alone, two pictures, and one more."""
    pictures = ([(40, 48)], [(90, 31)], [], [(64, 64), (33, 120)], [(40, 48)])
    rows = []
    for index, sizes in enumerate(pictures):
        images = tuple(encoded_picture(index, size=size) for size in sizes)
        turns = question_answer(QUESTIONS[index % 4], ANSWERS[index % 4], len(images))
        rows.append(processor.encode(Example(images, turns, where=f"row {index}")))
    return rows


def test_families_with_another_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL 3.5 speaks by Qwen3; one that nobody has tried is refused."""
    known = FAMILIES["internvl"]

    def with_text(kind: str) -> Path:
        def config(size: int, token: Callable[[str], int]) -> dict[str, Any]:
            found = known.config(size, token)
            return found | {"text_config": found["text_config"] | {"model_type": kind, "head_dim": 16}}

        monkeypatch.setitem(FAMILIES, kind, replace(known, config=config))
        return make_family(kind, tmp_path / kind)

    model, processor = opened(with_text("qwen3")), processor_of(tmp_path / "qwen3")
    require_packing(model)
    assert_apart(model, processor, encoded_rows(processor))
    with pytest.raises(RecipeError, match=r"\(internvl, gemma\) is not known"):
        require_packing(opened(with_text("gemma")))


def rows_by_hand(model: PreTrainedModel, *, pixels_per_token: int) -> list[Encoded]:
    """For families whose processor is not to be had everywhere: a picture between other tokens, and text alone."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for height, width in ((32, 16), (16, 48), (0, 0), (32, 32)):
        ids = torch.randint(300, 400, (9,), generator=generator)
        picture = torch.full((height * width // pixels_per_token,), model.config.image_token_id)
        ids = torch.cat([ids[:3], picture, ids[3:]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-3:] = ids[-3:]
        pixels = torch.randn(1, 3, height, width, generator=generator)
        pictures = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])} if height else {}
        rows.append(Encoded(b"", ids, labels, {}, pictures, num_positions=3, truncated=False))
    return rows


@pytest.mark.parametrize(("family", "pixels_per_token"), [("mistral3", 16 * 16), ("pixtral", 8 * 8)])
def test_families_without_a_processor_here(
    family: str, pixels_per_token: int, folder_of: Callable[[str], Path]
) -> None:
    model = opened(folder_of(family))
    require_packing(model)
    rows = rows_by_hand(model, pixels_per_token=pixels_per_token)
    together = states(model, packed(rows).inputs)[0].split([len(one.input_ids) for one in rows])
    for one, states_SD in zip(rows, together, strict=True):
        alone_SD = states(model, collated([one], pad_id=0).inputs)[0]
        assert (states_SD - alone_SD).norm() <= 1e-6 * alone_SD.norm()


def states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    body, head = split(model)
    with torch.no_grad():
        return last_hidden_states(body, in_dtype_of(head, inputs))


def assert_apart(model: PreTrainedModel, processor: ExampleProcessor, rows: list[Encoded]) -> None:
    together = states(model, packed(rows).inputs)[0].split([len(one.input_ids) for one in rows])
    for one, states_SD in zip(rows, together, strict=True):
        alone_SD = states(model, processor.collate([one]).inputs)[0]
        assert (states_SD - alone_SD).norm() <= 1e-6 * alone_SD.norm()


@pytest.mark.parametrize("family", PACKED)
def test_a_packed_example_is_what_it_is_alone(family: str, folder_of: Callable[[str], Path]) -> None:
    model, processor = opened(folder_of(family)), processor_of(folder_of(family))
    require_packing(model)
    rows = encoded_rows(processor)
    assert_apart(model, processor, rows)
    check_model(model, processor, two_examples(rows), device=CPU, packing=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_the_attention(attention: str, folder_of: Callable[[str], Path]) -> None:
    model, processor = opened(folder_of("qwen3_vl")), processor_of(folder_of("qwen3_vl"))
    model.set_attn_implementation(attention)
    assert_apart(model, processor, encoded_rows(processor))


@pytest.mark.parametrize("family", sorted(NOT_KNOWN))
def test_a_model_that_is_not_known_is_refused_by_name(family: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"optimization\.packing.*is not known to keep examples apart"):
        require_packing(opened(folder_of(family)))


@pytest.mark.parametrize("family", sorted(LINEAR))
def test_linear_attention_needs_its_kernels(family: str, folder_of: Callable[[str], Path]) -> None:
    if all(importlib.util.find_spec(name) for name in packing.KERNELS):
        pytest.skip("both are installed")
    with pytest.raises(RecipeError, match=r"linear attention.*flash-linear-attention.*cannot be found"):
        require_packing(opened(folder_of(family)))


# By the name's list they are refused; here nobody asks it.
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "gemma4", "paligemma", "mllama"])
def test_the_check_finds_a_leak_for_itself(
    family: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3.5 by positions alone, as other trainers pack: silently wrong."""
    monkeypatch.setattr(packing, "_for_kernels", lambda position_ids_1S: {})
    model, processor = opened(folder_of(family)), processor_of(folder_of(family))
    rows = encoded_rows(processor) if family != "paligemma" else encoded_pictures(processor)
    examples = two_examples(rows)
    try:
        check_model(model, processor, examples, device=CPU)
    except RecipeError:
        pytest.skip("this version of Transformers computes other logits, and the model is refused for that")
    with pytest.raises(RecipeError, match=r"packed into.*Set optimization\.packing to false"):
        check_model(model, processor, examples, device=CPU, packing=True)


def encoded_pictures(processor: ExampleProcessor) -> list[Encoded]:
    return [
        processor.encode(
            Example.single(encoded_picture(i), QUESTIONS[i], ANSWERS[i], kind="", case="", index=i)
        )
        for i in range(2)
    ]


def test_the_check_finds_a_leak_in_bfloat16(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_for_kernels", lambda position_ids_1S: {})
    model, processor = opened(folder_of("qwen3_5")).bfloat16(), processor_of(folder_of("qwen3_5"))
    examples = two_examples(encoded_rows(processor))
    with pytest.raises(RecipeError, match=r"packed into.*Set optimization\.packing to false"):
        check_model(model, processor, examples, device=CPU, packing=True)


def test_kernels_that_refuse_are_told_in_one_message(folder_of: Callable[[str], Path]) -> None:
    """Where they are missing, Transformers may say so itself; else the states tell."""
    if all(importlib.util.find_spec(name) for name in packing.KERNELS):
        pytest.skip("both are installed")
    model, processor = opened(folder_of("qwen3_5")), processor_of(folder_of("qwen3_5"))
    with pytest.raises(RecipeError, match=r"Set optimization\.packing to false"):
        check_model(model, processor, two_examples(encoded_rows(processor)), device=CPU, packing=True)


@pytest.mark.parametrize("family", sorted(LINEAR))
def test_linear_attention_with_kernels_that_know_where_examples_begin(
    family: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for the two packages, which need a GPU: each example through Transformers' own functions, alone."""
    model, processor = opened(folder_of(family)), processor_of(folder_of(family))
    module = sys.modules[type(model).__module__]
    rule, convolution = module.torch_chunk_gated_delta_rule, module.causal_conv1d_fn

    def rule_of_each(*values: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, **options: Any) -> Any:
        lengths = cu_seqlens.diff().tolist() if cu_seqlens is not None else [g.shape[1]]
        parts = zip(*(value.split(lengths, dim=1) for value in (*values, g, beta)), strict=True)
        normed = options["use_qk_l2norm_in_kernel"]
        found = [
            rule(*one, g=own_g, beta=own_beta, use_qk_l2norm_in_kernel=normed)[0]
            for *one, own_g, own_beta in parts
        ]
        return torch.cat(found, dim=1), None

    def convolution_of_each(
        hidden: Tensor, *weights: Any, activation: str, seq_idx: Tensor | None = None, **_: Any
    ) -> Tensor:
        lengths = [hidden.shape[-1]] if seq_idx is None else seq_idx[0].bincount().tolist()
        parts = hidden.split(lengths, dim=-1)
        return torch.cat([convolution(one, *weights, activation=activation) for one in parts], dim=-1)

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", rule_of_each)
    monkeypatch.setattr(module, "causal_conv1d_fn", convolution_of_each)
    assert_apart(model, processor, encoded_rows(processor))


def test_labels_and_their_places(folder_of: Callable[[str], Path]) -> None:
    """A label is predicted by the token before it, wherever its example begins."""
    processor = processor_of(folder_of("qwen3_vl"))
    rows = encoded_rows(processor)
    batch = packed(rows)
    ids = batch.inputs["input_ids"]
    assert ids.shape == (1, sum(len(one.input_ids) for one in rows))
    assert torch.equal(ids[0, batch.position_index + 1], batch.labels)
    assert torch.equal(batch.labels, torch.cat([one.answer_ids for one in rows]))
    assert (batch.inputs["position_ids"] == 0).sum() == len(rows)
    assert "attention_mask" not in batch.inputs
    assert batch.example_offsets.tolist() == processor.collate(rows).example_offsets.tolist()


def test_tokens_that_count_for_a_router() -> None:
    inputs = {
        "input_ids": torch.zeros(1, 6, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]),
    }
    assert counted_tokens(inputs, None).tolist() == [[1] * 6]
    assert counted_tokens(inputs, 2).tolist() == [[1, 1, 1, 1, 1, 0]]
    assert counted_tokens(inputs, 0).tolist() == [[0] * 6]


@pytest.fixture(scope="module")
def tree(
    mixed_folder: Path, folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A student that learns from labels and from its own first weights; every other row is text alone."""
    model = str(folder_of("qwen3_vl"))
    found = {
        "data": {"source": str(mixed_folder), "max_answer_tokens": 64},
        "teacher": {"model": model, "dtype": "float32"},
        "cache": {"path": str(tmp_path_factory.mktemp("packed") / "cache"), "num_workers": 0},
        "student": {"model": model, "compute_dtype": "float32"},
        "loss": {"chunk_size": 16},
        "optimization": {
            "global_batch_size": 8,
            "microbatch_size": 3,
            "max_steps": 2,
            "learning_rate": 1e-2,
        },
        "run": {"name": "padded", "num_workers": 0, "export": False},
    }
    with distributed(device="cpu") as world:
        assert capture(make_recipe(found, run__root="unused"), world, StopRequest()) == 0
    return found


def losses(recipe: Recipe) -> list[list[float]]:
    named = ("loss", "ce_loss", "kd_loss", "grad_norm", "kl")
    return [[one[name] for name in named if one.get(name) is not None] for one in records(recipe)[1:]]


def assert_same_losses(ours: Recipe, theirs: Recipe) -> None:
    mine, others = losses(ours), losses(theirs)
    assert len(mine) == len(others) > 3
    for one, other in zip(mine, others, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize(
    "student",
    [{}, {"activation_checkpointing": True, "freeze": {"vision": True}}, {"lora": {"rank": 4}}],
    ids=["whole", "recomputed, frozen tower", "adapters"],
)
def test_training_packed_and_padded_is_the_same(
    student: dict[str, Any], tree: dict[str, Any], tmp_path: Path
) -> None:
    settings = {f"student__{name}": value for name, value in student.items()} | {"run__root": str(tmp_path)}
    padded = make_recipe(tree, **settings)
    alone = make_recipe(tree, **settings, run__name="packed", optimization__packing=True)
    assert run_alone(padded) == 0
    assert run_alone(alone) == 0
    assert_same_losses(alone, padded)
    assert [r["padding"] for r in records(alone) if r["event"] == "step"] == [0.0] * 2
    assert max(r["padding"] for r in records(padded) if r["event"] == "step") > 0


def test_two_ranks_packed_are_one_padded_and_a_run_goes_on_either_way(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Microbatches of text alone on one rank while the other has pictures, too."""
    steps = {"run__root": str(tmp_path), "optimization__microbatch_size": 2}
    padded = make_recipe(tree, **steps)
    two = make_recipe(tree, **steps, run__name="two", optimization__packing=True)
    assert run_alone(padded) == 0
    assert run_ranks(two, 2) == [0, 0]
    assert_same_losses(two, padded)
    other, own = state_of(padded, 2), state_of(two, 2)
    for name in other:
        if name.startswith("exp_avg."):
            assert (own[name] - other[name]).norm() <= 1e-3 * other[name].norm(), name
    longer = {"optimization__max_steps": 4}
    going_on = make_recipe(tree, **steps, **longer, run__name="two")
    from_packed = make_recipe(tree, **steps, **longer, optimization__packing=True)
    assert run_alone(going_on, resume=True) == 0
    assert run_ranks(from_packed, 2, resume=True) == [0, 0]
    assert_same_losses(going_on, from_packed)


def test_a_student_that_cannot_be_packed_is_refused_before_it_trains(
    tree: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    gemma = str(folder_of("gemma3"))
    settings = {"student__model": gemma, "loss__kd_ratio": 0.0, "run__root": str(tmp_path)}
    recipe = make_recipe(tree, **settings, optimization__packing=True)
    with pytest.raises(RecipeError, match="is not known to keep examples apart"):
        run_alone(recipe)
    report = check_recipe(recipe, num_ranks=1)
    assert any("optimization.packing" in str(one) for one in report.errors)


def test_check_tells_what_packing_saves(tree: dict[str, Any], tmp_path: Path) -> None:
    padded = make_recipe(tree, run__root=str(tmp_path))
    alone = make_recipe(tree, run__root=str(tmp_path), optimization__packing=True)
    told = [dict(check_recipe(recipe, num_ranks=2).facts)["step"] for recipe in (padded, alone)]
    assert "padding 0.0%" not in told[0]
    assert "padding 0.0%" in told[1]


def test_a_run_proves_it_at_its_start(
    tree: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that leaks although it is on the list: on two ranks, both say so."""
    monkeypatch.setattr(packing, "KERNELS", {})
    monkeypatch.setattr(packing, "_for_kernels", lambda position_ids_1S: {})
    model = str(folder_of("qwen3_5"))
    settings = {"student__model": model, "loss__kd_ratio": 0.0, "run__root": str(tmp_path)}
    recipe = make_recipe(tree, **settings, optimization__packing=True)
    with pytest.raises(RecipeError, match=r"packed into.*Set optimization\.packing to false"):
        run_ranks(recipe, 2)


def test_a_router_counts_the_same_tokens_in_either_form(folder_of: Callable[[str], Path]) -> None:
    """Its loss, and the others; the last example is one for company, as a blank picture is."""
    folder = folder_of("qwen3_vl_moe")
    model, processor = opened(folder), processor_of(folder)
    text = model.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = True, 0.1
    student = StudentWithLoss(model, LossConfig(kd_ratio=0.0), num_token_ids=processor.num_token_ids)
    *rows, last = encoded_rows(processor)
    fed = [*rows, last.without_labels()]
    padded, alone = (
        student(batch.inputs, batch.position_index, batch.labels, None, len(rows))
        for batch in (processor.collate(fed), packed(fed))
    )
    assert padded.router is not None
    assert alone.router is not None
    assert alone.router.item() == pytest.approx(padded.router.item(), rel=1e-5)
    assert alone.losses.loss.item() == pytest.approx(padded.losses.loss.item(), rel=1e-5)
