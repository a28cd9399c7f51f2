"""A student whose layers are split among ranks trains as one on a single rank does, to rounding."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_steps import FirstStep, counts_of, differences, first_step, microbatches_of, opened
from safetensors.torch import load_file
from stage2_runs import (
    make_recipe,
    on_ranks,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    validation_records,
)
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from shared.errors import DataError, RecipeError, TrainingError
from shared.models.meshes import make_meshes
from shared.models.plans import has_plans
from shared.models.vlm import split
from shared.pipeline import make_student
from shared.recipes import recipe_text
from shared.runtime import World
from stage2_student.check import check_recipe
from stage2_student.estimate import GIB, MemoryEstimate, estimate_memory
from stage2_student.training.agreement import in_agreement
from stage2_student.training.optim import make_optimizer
from stage2_student.training.order import Slot
from stage2_student.training.step import train_step
from stage2_student.training.student import build_student, meta_model, plan_of_student

pytestmark = pytest.mark.skipif(not has_plans(), reason="needs a newer transformers")

EXPERTS = {
    "model_type": "qwen3_5_moe",
    "tie": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
}
STUDENTS: dict[str, dict[str, Any]] = {
    # 193 and 192 rows on two ranks; of 193, FSDP would leave the fourth of four ranks without any.
    "tied": {"tie": True, "vocab_size": 385},
    "untied": {"tie": False},
    "experts": EXPERTS,
    "router": EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.05},
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(_made(root / name, student_folder, **settings)) for name, settings in STUDENTS.items()}


def _made(folder: Path, like: Path, *, model_type: str = "qwen3_5", tie: bool, **text: Any) -> Path:
    """The small student with other settings, and random weights."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    plain = AutoConfig.from_pretrained(like).to_dict()
    own = {"model_type": f"{model_type}_text", "initializer_range": 0.1, "tie_word_embeddings": tie}
    config = AutoConfig.for_model(
        model_type,
        text_config=plain["text_config"] | own | text,
        vision_config=plain["vision_config"] | {"model_type": model_type},
        tie_word_embeddings=tie,
        **{key: value for key, value in plain.items() if key.endswith("_token_id")},
    )
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(like)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any], students: dict[str, str]
) -> dict[str, Any]:
    """Steps of 4, 4 and 1 of 9 examples, one microbatch each."""
    steps = {"max_steps": 3, "microbatch_size": 1, "learning_rate": 1e-3, "schedule": "constant"}
    return {
        **distillation_tree,
        "data": distillation_tree["data"] | {"limit": 9},
        "student": distillation_tree["student"] | {"model": students["tied"]},
        "loss": {"chunk_size": 16},
        "optimization": distillation_tree["optimization"] | steps,
        "run": {
            "name": "one",
            "root": str(tmp_path_factory.mktemp("runs")),
            "num_workers": 0,
            "export": False,
        },
    }


# Of each number of ranks: student, settings.
SPLITS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("tied", {"parallel__tensor": 2}),
        ("untied", {"parallel__tensor": 2, "student__activation_checkpointing": True}),
        ("untied", {"parallel__tensor": 2, "loss__kd_ratio": 1.0, "loss__temperature": 2.0}),
        ("router", {"parallel__tensor": 2}),
        ("experts", {"parallel__expert": 2}),
        ("untied", {"parallel__tensor": 2, "loss__positions": {"keep": 0.3, "by": "student_entropy"}}),
        ("tied", {"parallel__tensor": 2, "loss__positions": {"keep": 0.3, "by": "kl", "ce": "all"}}),
    ],
    4: [
        ("tied", {"parallel__tensor": 2, "parallel__cpu_offload": True}),
        ("untied", {"parallel__tensor": 2, "parallel__dp_replicate": 2}),
        ("experts", {"parallel__tensor": 2, "student__lora": {"rank": 4}}),
        ("experts", {"parallel__expert": 2, "parallel__dp_replicate": 2}),
        ("experts", {"parallel__expert": 4, "parallel__cpu_offload": True}),
    ],
}


def test_losses_and_gradients_are_those_of_one_rank(tree: dict[str, Any], students: dict[str, str]) -> None:
    for num_ranks, cases in SPLITS.items():
        expected = _first_steps(tree, students, cases, num_ranks=1)[0]
        every = _first_steps(tree, students, cases, num_ranks=num_ranks)
        for index, case in enumerate(cases):
            one, own = expected[index], every[0][index]
            assert {found[index][:2] for found in every} == {own[:2]}  # ranks agree to the last bit
            assert own.loss == pytest.approx(one.loss, rel=1e-6), case
            assert own.norm == pytest.approx(one.norm, rel=1e-5), case
            off = differences(own, one)
            assert {name: share for name, share in off.items() if share > 3e-4} == {}, case


def _first_steps(
    tree: dict[str, Any],
    students: dict[str, str],
    cases: list[tuple[str, dict[str, Any]]],
    *,
    num_ranks: int,
) -> list[list[FirstStep]]:
    """Of each rank; one rank has no parallel settings."""

    def settings_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in settings.items() if num_ranks > 1 or not k.startswith("parallel")}
        return kept | {"student__model": students[name]}

    recipes = [make_recipe(tree, **settings_of(*case)) for case in cases]
    return on_ranks(num_ranks, lambda world: [first_step(recipe, world) for recipe in recipes])


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("event") == other.pop("event")
        assert mine == pytest.approx(other, rel=1e-4)
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["tied", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks(tree: dict[str, Any], students: dict[str, str], name: str) -> None:
    """Four data ranks, then two of two each, and back; what is saved is what one rank has."""
    settings: dict[str, Any] = {"student__model": students[name]}
    one = make_recipe(tree, **settings, run__name=f"{name}-one")
    run_alone(one)
    split = {"parallel__tensor": 2} if name == "tied" else {"parallel__tensor": 2, "parallel__expert": 2}
    many: list[dict[str, Any]] = [{}, split, {}] if name == "tied" else [split, {"parallel__expert": 2}, {}]
    for num_steps, layout in enumerate(many, start=1):
        settings["optimization__max_steps"] = num_steps
        recipe = make_recipe(tree, **settings, **layout, run__name=f"{name}-many")
        assert run_ranks(recipe, 4, resume=num_steps > 1) == [0] * 4
    assert_same_losses(step_records(recipe), step_records(one))
    assert_same_losses(validation_records(recipe)[-1:], validation_records(one)[-1:])
    ours, theirs = state_of(recipe, 3), state_of(one, 3)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.startswith("model."):
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-3, msg=key)


def test_adapters_are_split_with_their_layers(tree: dict[str, Any], tmp_path: Path) -> None:
    """Three steps, as one factor has no gradient in the first; the export is that of the checkpoint."""
    lora = {"student__lora": {"rank": 4}, "optimization__learning_rate": 1e-2, "run__root": str(tmp_path)}
    one = make_recipe(tree, **lora)
    run_alone(one)
    many = make_recipe(tree, **lora, run__name="many", run__export=True, parallel__tensor=2)
    assert run_ranks(many, 2) == [0, 0]
    assert_same_losses(step_records(many), step_records(one))
    assert_same_losses(validation_records(many), validation_records(one))
    ours, theirs = state_of(many, 3), state_of(one, 3)
    adapters = [key for key in theirs if key.startswith("model.") and ".lora_" in key]
    assert len(adapters) > 20
    for key in adapters:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=1e-3, msg=key)
    exported = load_file(many.run.path / "export" / "adapter_model.safetensors")
    for name, tensor in exported.items():
        key = name.removeprefix("base_model.").replace(".weight", ".default.weight")
        assert torch.equal(tensor, ours[key])


def test_a_number_that_is_not_finite_on_one_rank_is_left_out_by_all(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, parallel__tensor=2)

    def poisoned_step(world: World) -> tuple[bool, bool]:
        inputs, world = opened(recipe, world)
        student = build_student(recipe, world, num_token_ids=inputs.processor.num_token_ids)
        microbatches = microbatches_of(recipe, inputs, world)
        counts = counts_of(microbatches, world)
        norm = student.model.model.language_model.layers[1].self_attn.q_norm.weight
        if world.rank == 1:  # seen by the heads of this rank alone
            norm.detach().to_local()[0] = torch.inf
        optimizer = make_optimizer(student, recipe.optimization)
        before = [p.to_local().clone() for p in student.parameters()]
        result = train_step(student, optimizer, microbatches, world, **counts, max_grad_norm=1.0)
        kept = zip(before, student.parameters(), strict=True)
        return result.updated, all(torch.equal(old, p.to_local()) for old, p in kept)

    assert on_ranks(2, poisoned_step) == [(False, True), (False, True)]


def test_ranks_of_one_copy_must_have_read_the_same_rows(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, parallel__tensor=2)

    def read(world: World) -> list[int]:
        inputs, world = opened(recipe, world)
        source = inputs.training_source()
        steps = [source[Slot(0, (0,))], source[Slot(1, (1 + world.rank,))]]
        return [step.num_positions for step in in_agreement((([one], 0.0) for one in steps), world)]

    first, other = on_ranks(2, read, errors=True)
    assert isinstance(first, TrainingError)
    assert str(first) == str(other)
    assert "have read different rows" in str(first)


def test_a_rank_that_is_late_for_those_it_shares_layers_with_ends_them() -> None:
    def work(world: World) -> None:
        mesh = make_meshes(world, tensor=2).tensor
        assert mesh is not None
        if world.rank == 1:
            time.sleep(6)
            raise DataError("of no interest here")
        dist.all_reduce(torch.ones(1), group=mesh.get_group())

    ended = on_ranks(2, work, collective_timeout_s=3.0, errors=True)
    assert isinstance(ended[0], TrainingError)
    assert "more than 3 s (parallel.collective_timeout_s)" in str(ended[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parallel__pipeline": 2}, "pipeline parallelism is not supported.* Set pipeline to 1"),
    (
        {"parallel__context": 2},
        "context parallelism is not supported.*a few hundred tokens. Set context to 1",
    ),
    ({"parallel__tensor": 2, "parallel__expert": 4}, "tensor is 2, expert 4.* the same number"),
    ({"parallel__tensor": 2, "student__compile": True}, "student.compile beside parallel.tensor"),
    (
        {"parallel__expert": 2, "student__lora": {"target_parameters": ["experts.down_proj"]}},
        "student.lora.target_parameters beside parallel.tensor",
    ),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED)
def test_what_does_not_go_together_is_refused(
    tree: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe(tree, **settings)


UNFIT: list[tuple[str, int, dict[str, Any], str]] = [
    ("tied", 3, {"parallel__tensor": 2}, "parallel.tensor 2 does not divide 3 ranks"),
    (
        "tied",
        6,
        {"parallel__tensor": 2, "parallel__dp_replicate": 2},
        "parallel.dp_replicate 2 times parallel.tensor 2 does not divide 6 ranks",
    ),
    ("experts", 3, {"parallel__expert": 2}, "parallel.expert 2 does not divide 3 ranks"),
    ("tied", 4, {"parallel__tensor": 4}, "parallel.tensor 4: .* has 2 heads"),
    ("tied", 2, {"parallel__expert": 2}, "no plan of expert parallelism for"),
    ("experts", 8, {"parallel__expert": 8}, "parallel.expert 8: .* has 4 experts"),
]


@pytest.mark.parametrize(("name", "num_ranks", "settings", "told"), UNFIT)
def test_sizes_that_do_not_fit_are_told_before_a_run(
    tree: dict[str, Any],
    students: dict[str, str],
    name: str,
    num_ranks: int,
    settings: dict[str, Any],
    told: str,
) -> None:
    report = check_recipe(make_recipe(tree, **settings, student__model=students[name]), num_ranks=num_ranks)
    assert len(report.problems) == 1, report.problems
    assert re.search(told, report.problems[0])


def test_a_number_of_ranks_is_refused_before_anything_is_made(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tree, parallel__tensor=2, cache__path=str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(recipe_text(recipe))
    with pytest.raises(RecipeError, match="does not divide 1 ranks"):
        make_student(str(tmp_path / "mine.yaml"), [], nproc=1)
    assert not (tmp_path / "cache").exists()


def test_the_estimate_counts_what_is_split(tree: dict[str, Any], students: dict[str, str]) -> None:
    def memory(num_ranks: int, name: str, **settings: Any) -> MemoryEstimate:
        recipe = make_recipe(tree, **settings, student__model=students[name])
        model = meta_model(recipe.student)
        plan = plan_of_student(model, recipe.parallel)
        return estimate_memory(model, recipe, num_ranks=num_ranks, tokens_per_example=100, plan=plan)

    one, sharded = memory(1, "untied"), memory(2, "untied")
    shared = memory(2, "untied", parallel__tensor=2)
    assert sharded.weights == pytest.approx(one.weights / 2)
    assert sharded.weights < shared.weights < one.weights  # the vision tower is whole on both
    assert shared.gathered < one.gathered == sharded.gathered
    assert one.loss / 2 < shared.loss < one.loss  # half of the ids, but a copy of their logits
    assert shared.activations == pytest.approx(one.activations * 11 / 17)
    experts = memory(2, "experts", parallel__expert=2)
    assert experts.weights == pytest.approx(memory(2, "experts").weights)
    assert experts.gathered < memory(2, "experts").gathered


def test_the_estimate_counts_gradients_where_they_lie(tree: dict[str, Any], students: dict[str, str]) -> None:
    def memory(*, trains_head: bool = True, **settings: Any) -> MemoryEstimate:
        recipe = make_recipe(tree, **settings, student__model=students["untied"])
        model = meta_model(recipe.student)
        split(model)[1].weight_VD.requires_grad_(trains_head)
        return estimate_memory(model, recipe, num_ranks=1, tokens_per_example=100)

    accumulated, at_once = memory(), memory(optimization__microbatch_size=4)
    head = split(meta_model(make_recipe(tree, student__model=students["untied"]).student))[1].weight_VD
    frozen = memory(trains_head=False)
    assert frozen.loss == pytest.approx(accumulated.loss - head.numel() * 4 / GIB)
    assert frozen.gradients == pytest.approx(accumulated.gradients - head.numel() * 4 / GIB)
    half = {"student__param_dtype": "bfloat16"}
    assert (
        memory(**half).gradients == accumulated.gradients == at_once.gradients
    )  # microbatches add up in fp32
    assert memory(**half, optimization__microbatch_size=4).gradients == at_once.gradients / 2
    offloaded = {"parallel__cpu_offload": True}
    assert memory(**offloaded).gradients == accumulated.gradients  # the sum goes to the host at the end
    assert memory(**offloaded, optimization__microbatch_size=4).gradients == 0
