"""``loss.positions``: training on the most uncertain positions of each answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage2_runs import (
    assert_same_state,
    make_recipe,
    on_ranks,
    records,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    validation_records,
)
from torch import Tensor

from shared.cache import CacheReader
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import CheckpointError, RecipeError
from shared.kd_loss import ce_kd_by_position, fused_ce_kd
from shared.kd_loss.kept import highest, num_kept
from shared.kd_loss.uncertainty import student_entropy
from shared.models.vlm import last_hidden_states, load_vlm
from shared.recipes import Recipe
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.runtime import World
from shared.sparse import SparseTargets, position_seeds, sparsify
from shared.sparse.entropies import position_entropies
from stage2_student.evaluation.run_records import points, read_run

N, D, V = 11, 6, 19
LENGTHS = (4, 1, 6)

# --- which positions --------------------------------------------------------------------------------------


def test_a_share_of_each_example_is_kept_rounded_up() -> None:
    assert num_kept([0, 1, 4, 5, 6, 100], 0.2) == [0, 1, 1, 1, 2, 20]
    assert num_kept([100], 0.07) == [7]  # 0.07 * 100 is above 7
    assert num_kept([3, 8], 1.0) == [3, 8]


def test_the_highest_of_each_example_are_kept_whatever_stands_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (40,), generator=generator).tolist()
    scores = torch.randint(0, 4, (sum(lengths),), generator=generator).float()  # with many equal ones
    found, start, alone = highest(scores, lengths, 0.3).tolist(), 0, []
    wanted = []
    for length in lengths:
        own = scores[start : start + length]
        order = sorted(range(length), key=lambda place, own=own: (-own[place].item(), place))
        wanted += sorted(start + place for place in order[: math.ceil(0.3 * length)])
        alone += [start + place for place in highest(own, [length], 0.3).tolist()]
        start += length
    assert found == wanted == alone
    assert highest(torch.zeros(0), [], 0.5).tolist() == []
    assert highest(torch.zeros(0), [0, 0], 0.5).tolist() == []


# --- by what ------------------------------------------------------------------------------------------------


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))
    hidden, weight, bias = (one.to(dtype) for one in made)
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_students_entropy_is_that_of_its_softmax(chunk_size: int, softcap: float | None) -> None:
    hidden, weight, bias, labels = head()
    hidden[2] *= 400  # sure: no digits are lost, and nothing is 0 times infinity
    logits = hidden @ weight.t() + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    found = student_entropy(hidden, weight, labels, chunk_size=chunk_size, bias_V=bias, softcap=softcap)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    none = student_entropy(hidden[:0], weight, labels[:0], chunk_size=chunk_size)
    assert none.shape == (0,)


def test_a_split_head_gives_every_rank_the_same_entropy() -> None:
    hidden, weight, bias, labels = head(torch.float32)
    whole = student_entropy(hidden, weight, labels, chunk_size=4, bias_V=bias)

    def of_a_part(world: World) -> Tensor:
        part = slice(0, 12) if world.is_main else slice(12, V)
        group = torch.distributed.group.WORLD
        return student_entropy(hidden, weight[part], labels, chunk_size=4, bias_V=bias[part], tp_group=group)

    first, other = on_ranks(2, of_a_part)
    assert torch.equal(first, other)
    torch.testing.assert_close(first, whole, atol=1e-6, rtol=1e-5)


def targets_of(logits: Tensor, policy: Policy, temperatures: tuple[float, ...] = (1.0,)) -> SparseTargets:
    """As a cache gives them: it has kept the entropy of each row alone."""
    seeds = position_seeds(0, b"key", len(logits))
    targets = sparsify(logits.log_softmax(-1), policy, temperatures=temperatures, seeds=seeds)
    sums = torch.stack([row.double().sum(0) for row in targets.entropy.split(LENGTHS)]).numpy()
    return replace(targets, entropy=position_entropies(targets, sums, LENGTHS))


def teacher_logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sharpness = torch.linspace(0.5, 9, N)[torch.randperm(N, generator=generator)]
    return torch.randn(N, V, generator=generator) * sharpness[:, None]


@pytest.mark.parametrize(
    ("temperature", "captured"),
    [(1.0, (1.0, 2.0)), (2.0, (1.0, 2.0)), (0.5, (0.5,)), (2.0, (2.0,))],
)
@pytest.mark.parametrize(
    ("policy", "close"),
    [
        (Threshold(tau=2.0**-19), 2e-3),
        (TopK(k=V), 2e-3),
        (Threshold(tau=1 / 64), 0.5),
        (Random(draws=400), 0.5),
        (Random(draws=1), 3.0),  # which says nothing of an entropy
    ],
    ids=["whole", "whole by top_k", "threshold", "random", "one draw"],
)
def test_the_teachers_entropy_comes_from_what_was_kept(
    policy: Policy, close: float, temperature: float, captured: tuple[float, ...]
) -> None:
    logits = teacher_logits()
    targets = targets_of(logits, policy, captured)
    found = targets.entropy[:, captured.index(temperature)]
    exact = torch.distributions.Categorical(logits=logits / temperature).entropy()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=close, rtol=0)
    for ours, theirs in zip(found.split(LENGTHS), exact.split(LENGTHS), strict=True):
        assert ours.sum() == pytest.approx(
            theirs.sum().item(), abs=2e-3
        )  # of a row exact, whatever was drawn
    none = position_entropies(targets.slice(0, 0), np.zeros((0, len(captured))), ())
    assert none.shape == (0, len(captured))


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 4), Random(draws=4)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_position_that_is_kept_whole_has_its_own_entropy(policy: Policy, temperature: float) -> None:
    """By chance, too: at several temperatures a kept token's probability is known, however it was drawn."""
    logits = torch.full((N, V), -torch.inf)
    logits[:, :3] = torch.tensor([0.0, -1.5, -2.0])
    targets = targets_of(logits, policy, (1.0, 2.0))
    is_whole = targets.counts == 3
    assert 0 < is_whole.sum() < N
    exact = torch.distributions.Categorical(logits=logits[0, :3] / temperature).entropy()
    found = targets.entropy[is_whole, targets.temperatures.index(temperature)]
    torch.testing.assert_close(found, exact.expand_as(found), atol=2e-3, rtol=0)


def test_the_kd_of_a_position_is_its_kl() -> None:
    """Zero at each place for a student that is its teacher; for another one, nearly what a dense teacher gives."""
    logits = teacher_logits()
    targets = targets_of(logits, Threshold(tau=1 / 512))
    labels = torch.zeros(N, dtype=torch.int64)
    same = ce_kd_by_position(logits, torch.eye(V), labels, targets).kd_N
    torch.testing.assert_close(same, torch.zeros(N), atol=0.05, rtol=0)
    other = logits.roll(1, dims=1)
    dense = (logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    found = ce_kd_by_position(other, torch.eye(V), labels, targets).kd_N
    torch.testing.assert_close(found, dense, atol=0.05, rtol=0.05)


# --- KD at some positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("policy", "tail"),
    [(Threshold(tau=0.1), "ghost"), *((TopK(k=3), t) for t in ("ghost", "uniform", "renormalize", "drop"))],
)
def test_factors_of_kd_are_factors_of_kd_alone(policy: Policy, tail: str, temperature: float) -> None:
    """Against the losses of each position and gradients of each alone; some positions do not count at all."""
    hidden, weight, _, labels = head()
    labels[4] = -100
    targets = targets_of(teacher_logits(), policy, (1.0, 2.0))
    factors = torch.rand(N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    factors[[1, 5, 6]] = 0
    weights = 2 * torch.rand(N, generator=torch.Generator().manual_seed(8))
    options = {"temperature": temperature, "tail": tail}
    found = [one.clone().requires_grad_() for one in (hidden, weight)]
    sums = fused_ce_kd(
        *found,
        labels,
        targets,
        kd_ratio=0.3,
        weights_N=weights,
        kd_factors_N=factors,
        chunk_size=3,
        **options,
    )
    each = ce_kd_by_position(hidden, weight, labels, targets, **options)
    torch.testing.assert_close(sums.ce, (weights * each.ce_N).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.kd, (weights * factors * each.kd_N).sum(), rtol=1e-6, atol=1e-8)
    entropy = (weights * factors * each.teacher_entropy_N).sum()
    torch.testing.assert_close(sums.teacher_entropy, entropy, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(sums.loss, 0.7 * sums.ce + 0.3 * sums.kd)
    sums.loss.backward()
    wanted = [one.clone().requires_grad_() for one in (hidden, weight)]
    ce = fused_ce_kd(*wanted, labels, targets, kd_ratio=0.0, weights_N=weights, **options).loss
    kd = fused_ce_kd(
        *wanted, labels, targets, kd_ratio=1.0, weights_N=(weights * factors).float(), **options
    ).loss
    (0.7 * ce + 0.3 * kd).backward()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    run = {"root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0, "export": False}
    steps = {"max_steps": 3, "schedule": "constant"}
    return distillation_tree | {
        "optimization": distillation_tree["optimization"] | steps,
        "loss": {"kd_ratio": 0.3},
        "run": run | {"name": "plain", "checkpoint_every": 1, "keep_checkpoints": 9},
    }


KEEP = 0.3
WHOLE = {"optimization__global_batch_size": 12, "optimization__max_steps": 1}


def recipe_of(tree: dict[str, Any], name: str, **settings: Any) -> Recipe:
    positions = {"keep": KEEP, "by": "student_entropy"} | settings.pop("positions", {})
    return make_recipe(tree, run__name=name, loss__positions=positions, **settings)


@pytest.fixture(scope="module")
def by_position(tree: dict[str, Any], student_folder: Path, teacher_cache: Path) -> dict[str, Any]:
    """Of the untrained student: losses of each position of the training rows, and what chooses among them."""
    recipe, reader = make_recipe(tree), CacheReader(str(teacher_cache))
    processor = open_processor(str(student_folder), recipe.data)
    model = load_vlm(str(student_folder), revision=None, dtype=torch.float32, attn_implementation=None).eval()
    encoded = [processor.encode(example) for example in open_split(recipe.data, "train")]
    targets = reader.targets(reader.rows([one.key for one in encoded]))
    batch, lengths = processor.collate(encoded), [one.num_positions for one in encoded]
    with torch.no_grad():
        hidden = last_hidden_states(model.base_model, batch.inputs).flatten(0, 1)[batch.position_index]
        weight = model.get_output_embeddings().weight.detach()
    losses = ce_kd_by_position(hidden, weight, batch.labels, targets, num_vocab_ids=processor.num_token_ids)
    return {
        "losses": losses,
        "lengths": lengths,
        "student_entropy": torch.distributions.Categorical(logits=hidden @ weight.t()).entropy(),
        "teacher_entropy": targets.entropy[:, 0],
        "kl": losses.kd_N,
    }


@pytest.mark.parametrize(
    ("by", "ce"),
    [("student_entropy", "kept"), ("student_entropy", "all"), ("teacher_entropy", "kept"), ("kl", "kept")],
)
def test_a_step_is_of_the_most_uncertain_positions(
    tree: dict[str, Any], by_position: dict[str, Any], by: str, ce: str
) -> None:
    recipe = recipe_of(tree, f"{by}-{ce}", positions={"by": by, "ce": ce}, **WHOLE)
    assert run_alone(recipe) == 0
    losses, lengths = by_position["losses"], by_position["lengths"]
    kept = highest(by_position[by], lengths, KEEP)
    assert len(kept) < 0.4 * len(losses.ce_N)
    (step,) = [record for record in records(recipe) if record["event"] == "step"]
    assert (step["num_positions"], step["num_kept"]) == (len(losses.ce_N), len(kept))
    ce_mean = (losses.ce_N if ce == "all" else losses.ce_N[kept]).mean().item()
    kd_mean = losses.kd_N[kept].mean().item()
    assert step["ce_loss"] == pytest.approx(ce_mean, rel=1e-4)
    assert step["kd_loss"] == pytest.approx(kd_mean, rel=1e-4)
    assert step["loss"] == pytest.approx(0.7 * ce_mean + 0.3 * kd_mean, rel=1e-4)
    assert points(read_run(recipe.run.path), "step", "kl") == []  # of the kept positions alone it is none


def test_all_kept_is_training_as_it_was_bit_for_bit(tree: dict[str, Any]) -> None:
    plain = make_recipe(tree)
    whole = recipe_of(tree, "whole", positions={"keep": 1.0, "by": "teacher_entropy"})
    assert run_alone(plain) == 0
    assert run_alone(whole) == 0
    assert step_records(whole) == step_records(plain)
    assert_same_state(state_of(whole, 3), state_of(plain, 3))
    assert not any("num_kept" in record for record in records(plain))
    assert validation_records(whole)[0]["num_positions"] == validation_records(plain)[0]["num_positions"]


@pytest.mark.parametrize("positions", [{}, {"by": "kl", "ce": "all"}], ids=["entropy", "kl, all CE"])
def test_ranks_and_microbatches_change_it_by_rounding_alone_and_a_run_goes_on_bit_for_bit(
    tree: dict[str, Any], positions: dict[str, Any]
) -> None:
    name = positions.get("by", "entropy")
    one = recipe_of(tree, f"one-{name}", positions=positions)
    two = recipe_of(tree, f"two-{name}", positions=positions, optimization__microbatch_size=1)
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    for ours, theirs in zip(step_records(two), step_records(one), strict=True):
        assert ours["num_positions"] == theirs["num_positions"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)
    halted = f"halted-{name}"
    assert run_alone(recipe_of(tree, halted, positions=positions, optimization__max_steps=2)) == 0
    other = recipe_of(tree, halted, positions=positions | {"keep": 0.5})
    with pytest.raises(CheckpointError, match=r"loss\.positions\.keep: the run has 0\.3, now it is 0\.5"):
        run_alone(other, resume=True)
    again = recipe_of(tree, halted, positions=positions)
    assert run_alone(again, resume=True) == 0
    assert step_records(again) == step_records(one)
    assert_same_state(state_of(again, 3), state_of(one, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss__kd_ratio": 0.0, "positions": {"by": "kl"}}, "no teacher to choose by"),
        ({"loss__kd_ratio": 0.0, "positions": {"ce": "all"}}, "no KD, so all positions would count"),
        ({"loss__kd_ratio": 1.0, "positions": {"ce": "all"}}, "there is no CE"),
        ({"positions": {"keep": 0.0}}, "greater than 0"),
    ],
)
def test_what_would_mean_nothing_is_refused(
    tree: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tree, "refused", **settings)
