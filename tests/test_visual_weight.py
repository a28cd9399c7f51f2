"""``loss.visual_weight``: in training positions weigh by what the pictures gave the teacher there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_examples import VERSIONS, keys_and_rows, make_identity, make_key, make_row
from stage2_runs import (
    assert_same_state,
    make_recipe,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    validation_records,
)

from shared.cache import CacheReader, CacheWriter
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, CheckpointError, RecipeError
from shared.kd_loss import ce_kd_by_position
from shared.models.vlm import last_hidden_states, load_vlm
from shared.recipes import Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.evaluation.run_records import points, read_run
from stage2_student.training import visual_weight
from stage2_student.training.visual_weight import VisualWeight, lost_without


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, vqa_folder: Path, teacher_folder: Path, student_folder: Path
) -> dict[str, Any]:
    """Three steps of four rows; the cache tells what pictures gave."""
    folder = tmp_path_factory.mktemp("visual")
    tree = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(folder / "cache"), "visual_gain": "blurred", "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"visual_weight": 0.8},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "schedule": "constant",
        },
        "run": {
            "name": "one",
            "root": str(folder / "runs"),
            "num_workers": 0,
            "export": False,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
        },
    }
    with distributed(device="cpu") as world:
        assert capture(make_recipe(tree), world, StopRequest()) == 0
    return tree


@pytest.fixture(scope="module")
def one(tree: dict[str, Any]) -> Recipe:
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    return recipe


@pytest.fixture(scope="module")
def plain(tree: dict[str, Any]) -> Recipe:
    """All positions weigh the same."""
    recipe = make_recipe(tree, run__name="plain", loss__visual_weight=None)
    assert run_alone(recipe) == 0
    return recipe


def keys_of(recipe: Recipe) -> list[bytes]:
    processor = open_processor(recipe.student.model, recipe.data)
    return [processor.key(example) for example in open_split(recipe.data, "train")]


def test_weights_average_one_over_the_training_rows(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree)
    reader, keys = CacheReader(tree["cache"]["path"]), keys_of(recipe)
    visual = VisualWeight.of(recipe, reader, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
    assert visual is not None
    gains = reader.label_gains(reader.rows(keys))
    weights = visual.of_positions(gains)
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)
    assert weights[gains <= 0].tolist() == pytest.approx([0.2] * int((gains <= 0).sum()))
    assert torch.equal(weights.argsort(stable=True), gains.clamp_min(0).argsort(stable=True))
    exact = 1 - torch.exp(-gains.double().clamp_min(0))
    torch.testing.assert_close(lost_without(gains).double(), exact, rtol=1e-6, atol=1e-7)


def test_a_step_weighs_ce_and_kd_and_validation_weighs_none(
    tree: dict[str, Any], one: Recipe, plain: Recipe, student_folder: Path
) -> None:
    """Of a step over all rows, against the student's own losses at each position, weighed here."""
    whole = make_recipe(
        tree,
        run__name="whole",
        optimization__global_batch_size=12,
        optimization__max_steps=1,
    )
    assert run_alone(whole) == 0
    assert points(read_run(whole.run.path), "step", "kl") == []  # a weighted mean is none
    assert points(read_run(plain.run.path), "step", "kl") != []
    reader, processor = CacheReader(tree["cache"]["path"]), open_processor(str(student_folder), whole.data)
    model = load_vlm(str(student_folder), revision=None, dtype=torch.float32, attn_implementation=None).eval()
    encoded = [processor.encode(example) for example in open_split(whole.data, "train")]
    rows = reader.rows([each.key for each in encoded])
    batch, gains = processor.collate(encoded), reader.label_gains(rows)
    with torch.no_grad():
        hidden = last_hidden_states(model.base_model, batch.inputs).flatten(0, 1)[batch.position_index]
    found = ce_kd_by_position(
        hidden,
        model.get_output_embeddings().weight.detach(),
        batch.labels,
        reader.targets(rows),
        num_vocab_ids=processor.num_token_ids,
    )
    u = 1 - torch.exp(-gains.clamp_min(0))
    weights = 0.2 + 0.8 * u / u.mean()
    (step,) = step_records(whole)
    assert step["num_positions"] == len(batch.labels)
    assert step["ce_loss"] == pytest.approx((weights * found.ce_N).mean().item(), rel=1e-4)
    assert step["kd_loss"] == pytest.approx((weights * found.kd_N).mean().item(), rel=1e-4)
    assert step["loss"] == pytest.approx((step["ce_loss"] + step["kd_loss"]) / 2, rel=1e-6)
    assert (weights * found.ce_N).mean().item() != pytest.approx(found.ce_N.mean().item(), rel=1e-3)
    first = [validation_records(recipe)[0] for recipe in (one, plain)]
    assert first[0] == first[1]


def test_weight_0_is_training_as_it_was_bit_for_bit(tree: dict[str, Any], plain: Recipe) -> None:
    zero = make_recipe(tree, run__name="zero", loss__visual_weight=0.0)
    assert run_alone(zero) == 0
    assert step_records(zero) == step_records(plain)
    assert_same_state(state_of(zero, 3), state_of(plain, 3))


def test_ranks_and_microbatches_change_it_by_rounding_alone(tree: dict[str, Any]) -> None:
    """At 1 many positions weigh nothing: a microbatch may have none that counts."""
    alone = make_recipe(tree, run__name="alone", loss__visual_weight=1.0)
    two = make_recipe(tree, run__name="two", loss__visual_weight=1.0, optimization__microbatch_size=1)
    assert run_alone(alone) == 0
    assert run_ranks(two, 2) == [0, 0]
    for ours, theirs in zip(step_records(two), step_records(alone), strict=True):
        assert ours["num_positions"] == theirs["num_positions"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


def test_a_run_goes_on_bit_for_bit_and_only_with_its_weight(tree: dict[str, Any], one: Recipe) -> None:
    assert run_alone(make_recipe(tree, run__name="halted", optimization__max_steps=2)) == 0
    with pytest.raises(CheckpointError, match=r"loss\.visual_weight: the run has 0\.8, now it is 0\.5"):
        run_alone(make_recipe(tree, run__name="halted", loss__visual_weight=0.5), resume=True)
    again = make_recipe(tree, run__name="halted")
    assert run_alone(again, resume=True) == 0
    assert step_records(again) == step_records(one)
    assert_same_state(state_of(again, 3), state_of(one, 3))


def test_the_mean_is_of_rows_spread_over_the_split(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reader = make_recipe(tree), CacheReader(tree["cache"]["path"])
    keys = keys_of(recipe)
    monkeypatch.setattr(visual_weight, "MAX_ROWS", 4)
    monkeypatch.setattr(visual_weight, "ROWS_TOGETHER", 3)
    found = VisualWeight.of(recipe, reader, keys)
    assert found is not None
    gains = reader.label_gains(reader.rows([keys[0], keys[3], keys[6], keys[9]]))
    assert found.mean == pytest.approx(lost_without(gains).mean().item(), rel=1e-6)


def test_a_cache_without_gains_is_refused(tree: dict[str, Any], teacher_cache: Path) -> None:
    other = make_recipe(tree, run__name="other", cache__path=str(teacher_cache))
    with pytest.raises(CacheMismatchError, match=r'visual_gain: null in the cache, "blurred" asked for'):
        run_alone(other)
    with pytest.raises(RecipeError, match=r"visual_weight needs a cache that tells what pictures gave"):
        make_recipe(tree, cache__visual_gain=None)
    with pytest.raises(RecipeError, match=r"visual_weight beside loss\.kd_ratio 0"):
        make_recipe(tree, loss__kd_ratio=0.0)
    with pytest.raises(RecipeError, match=r"visual_weight beside loss\.reverse_kl"):
        make_recipe(tree, loss__reverse_kl=1.0, cache__label_log_prob=True)


def test_a_teacher_that_looks_at_no_picture_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    identity = make_identity(visual_gain="blurred")
    with CacheWriter.open(str(tmp_path), identity, created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=6)
        with writer.unit(plan.units[0]) as shard:
            for number in range(6):
                row = make_row(number, identity)
                shard.add(replace(row, label_gain=row.label_gain.clip(max=0)))
        writer.commit(plan)
    with pytest.raises(CacheMismatchError, match=r"no token of 6 training rows is likelier"):
        VisualWeight.of(make_recipe(tree), CacheReader(str(tmp_path)), [make_key(n) for n in range(6)])
