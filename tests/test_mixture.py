"""Several teachers' targets of the same positions: they add up, stay unbiased, and so do loss and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import reference_losses as reference
import torch
from torch import Tensor

from shared.errors import CacheMismatchError, RecipeError
from shared.kd_loss import Divergence, KDLoss, fused_ce_kd
from shared.recipes.policies import Policy, Random, Threshold, TopK, TopP
from shared.sparse import MixedTargets, SparseTargets, mix, position_seeds, sparsify

VOCAB_SIZE = 37
SHARES = (0.7, 0.3)
SAMPLED = [Threshold(tau=1 / 8), Threshold(tau=1 / 8, values="fp16"), Random(draws=11)]
CUT_OFF = [TopK(k=3), TopP(p=0.8)]


def logprobs_of(seed: int, num_positions: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_positions, VOCAB_SIZE, generator=generator)).log_softmax(-1)


def captured(
    seed: int, policy: Policy, temperatures: tuple[float, ...] = (1.0,), num_positions: int = 6
) -> SparseTargets:
    seeds = position_seeds(seed, bytes(16), num_positions)
    return sparsify(logprobs_of(seed, num_positions), policy, temperatures=temperatures, seeds=seeds)


def dense(targets: SparseTargets | MixedTargets, temperature: float = 1.0) -> Tensor:
    """(N, V) fp64, entry by entry."""
    weights = targets.weights(temperature, torch.float64)
    found = torch.zeros(targets.num_positions, VOCAB_SIZE, dtype=torch.float64)
    for position in range(targets.num_positions):
        for entry in range(int(targets.offsets[position]), int(targets.offsets[position + 1])):
            found[position, int(targets.ids[entry])] += weights[entry]
    return found


@pytest.mark.parametrize("policy", [*SAMPLED, *CUT_OFF], ids=str)
def test_weights_add_up_and_each_id_comes_once(policy: Policy) -> None:
    parts = [captured(1, policy), captured(2, policy), captured(3, policy)]
    shares = (0.5, 0.3, 0.2)
    mixed = mix(parts, shares=shares)
    expected = sum(share * dense(part) for part, share in zip(parts, shares, strict=True))
    torch.testing.assert_close(dense(mixed), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(mixed.weights().double(), mixed.weights(1.0, torch.float64), rtol=1e-6, atol=0)
    ids = [mixed.ids[a:b].tolist() for a, b in zip(mixed.offsets, mixed.offsets[1:], strict=False)]
    assert ids == [sorted(set(one)) for one in ids]
    entropy = sum(share * part.entropy for part, share in zip(parts, shares, strict=True))
    torch.testing.assert_close(mixed.entropy, entropy)


@pytest.mark.parametrize(
    ("policy", "temperatures"),
    [
        (Threshold(tau=1 / 8), (1.0,)),
        (Threshold(tau=1 / 8, values="fp16"), (1.0,)),
        (Threshold(tau=1 / 8, values="fp16"), (1.0, 2.0)),
        (Random(draws=5), (1.0,)),
        (Random(draws=5), (1.0, 2.0)),
    ],
    ids=str,
)
def test_the_mean_over_many_draws_is_the_mean_distribution(
    policy: Policy, temperatures: tuple[float, ...]
) -> None:
    num_draws = 4000
    one, other = (logprobs_of(seed, 1) for seed in (1, 2))
    parts = [
        sparsify(
            logprobs.expand(num_draws, -1).contiguous(),
            policy,
            temperatures=temperatures,
            seeds=position_seeds(seed, bytes(16), num_draws),
        )
        for seed, logprobs in enumerate((one, other))
    ]
    mixed = mix(parts, shares=SHARES)
    for temperature in temperatures:
        weights = mixed.weights(temperature, torch.float64)
        drawn = torch.zeros(num_draws, VOCAB_SIZE, dtype=torch.float64)
        drawn[mixed.position_index, mixed.ids.long()] = weights
        p, q = ((logprobs[0].double() / temperature).softmax(-1) for logprobs in (one, other))
        expected = SHARES[0] * p + SHARES[1] * q
        error = drawn.std(0) / math.sqrt(num_draws) + 1e-4  # which is what fp16 leaves of a certain one
        assert ((drawn.mean(0) - expected).abs() < 5 * error).all()


def loss_and_gradients(
    targets: SparseTargets | MixedTargets,
    *,
    tail: str = "ghost",
    temperature: float = 1.0,
    chunk_size: int = 512,
    labels: Sequence[int] = (1, 2, -100, 4, 5, 6),
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE + 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    sums = fused_ce_kd(
        hidden,
        weight,
        torch.tensor(labels),
        targets,
        kd_ratio=0.6,
        temperature=temperature,
        chunk_size=chunk_size,
        tail=tail,
        num_vocab_ids=VOCAB_SIZE,
    )
    sums.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return torch.stack(list(sums[:4])).detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
@pytest.mark.parametrize(
    ("policy", "tail"),
    [(policy, "ghost") for policy in SAMPLED]
    + [(policy, tail) for policy in CUT_OFF for tail in ("uniform", "renormalize", "drop")],
    ids=str,
)
def test_loss_and_gradient_are_the_weighted_means_of_those_of_each(
    policy: Policy, tail: str, chunk_size: int
) -> None:
    parts = [captured(1, policy), captured(2, policy)]
    found = loss_and_gradients(mix(parts, shares=SHARES), tail=tail, chunk_size=chunk_size)
    alone = [loss_and_gradients(part, tail=tail) for part in parts]
    for mine, one, other in zip(found, *alone, strict=True):
        torch.testing.assert_close(mine, SHARES[0] * one + SHARES[1] * other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_dense_teachers_where_nothing_is_drawn(temperature: float) -> None:
    """At a threshold below all masses the targets are the distributions themselves, to fp16."""
    policy = Threshold(tau=1e-6, values="fp16")
    parts = [captured(seed, policy, (1.0, 2.0)) for seed in (1, 2)]
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.zeros(6, dtype=torch.int64)
    ours = KDLoss(temperature=temperature)(logits, mix(parts, shares=SHARES), labels)
    (gradient,) = torch.autograd.grad(ours, logits)
    teachers = [logprobs_of(seed).double() for seed in (1, 2)]
    theirs = sum(
        share * reference.dense_kd(logits[n], teacher[n], temperature)
        for n in range(6)
        for teacher, share in zip(teachers, SHARES, strict=True)
    )
    (expected,) = torch.autograd.grad(theirs / 6, logits)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()) / 6, rel=1e-3)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5)
    # The gradient is that of the mean distribution, as one teacher.
    mean = sum(s * (t / temperature).softmax(-1) for t, s in zip(teachers, SHARES, strict=True))
    soft = (-(mean * (logits / temperature).log_softmax(-1)).sum() * temperature**2) / 6
    torch.testing.assert_close(gradient, torch.autograd.grad(soft, logits)[0], rtol=1e-3, atol=2e-5)


def test_a_mix_of_one_teacher_with_itself_is_that_teacher() -> None:
    part = captured(1, Threshold(tau=1 / 8))
    mixed = mix([part, part], shares=(0.5, 0.5))
    assert torch.equal(mixed.ids, part.ids)
    assert torch.equal(mixed.weights(), part.weights())
    assert [one.tolist() for one in mixed.likeliest()] == [one.tolist() for one in part.likeliest()]


@pytest.mark.parametrize("policy", CUT_OFF, ids=str)
def test_buckets_of_several_teachers_are_refused_by_name(policy: Policy) -> None:
    mixed = mix([captured(1, policy), captured(2, policy)], shares=SHARES)
    with pytest.raises(
        RecipeError, match=rf"tail ghost of a mix of {policy.kind} caches.*uniform, renormalize or drop"
    ):
        loss_and_gradients(mixed, tail="ghost")


def test_what_is_not_linear_in_the_teacher_is_refused_by_name() -> None:
    mixed = mix([captured(1, TopK(k=3)), captured(2, TopK(k=3))], shares=SHARES)
    with pytest.raises(RecipeError, match="reverse_kl of a mix of 2 caches"):
        KDLoss(divergence=Divergence("reverse_kl"))(
            torch.randn(6, VOCAB_SIZE), mixed, torch.zeros(6, dtype=torch.int64)
        )


def test_parts_of_a_mixture_are_mixtures_of_parts() -> None:
    parts = [captured(seed, Random(draws=7), (1.0, 2.0)) for seed in (1, 2)]
    mixed = mix(parts, shares=SHARES)
    whole = dense(mixed, 2.0)
    assert torch.equal(dense(mixed.slice(2, 5), 2.0), whole[2:5])
    assert torch.equal(dense(mixed.slice(3, 3), 2.0), whole[3:3])
    index = torch.tensor([5, 0, 0, 3])
    assert torch.equal(dense(mixed.select(index), 2.0), whole[index])
    assert torch.equal(
        dense(mixed.to("cpu").pin_memory() if torch.cuda.is_available() else mixed.to("cpu"), 2.0), whole
    )


@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,)])
def test_the_likeliest_ids_are_those_of_the_mean_of_what_was_kept(temperatures: tuple[float, ...]) -> None:
    parts = [captured(seed, TopK(k=3), temperatures) for seed in (1, 2)]
    mean = torch.zeros(6, VOCAB_SIZE)
    for part, share in zip(parts, SHARES, strict=True):
        mean[part.position_index, part.ids.long()] += share * part.logprobs.float().exp()
    top, ids = mix(parts, shares=SHARES).likeliest()
    assert torch.equal(ids, mean.argmax(-1))
    torch.testing.assert_close(top, mean.amax(-1))


def test_only_temperatures_that_all_have_are_served() -> None:
    parts = [captured(1, Random(draws=7), (1.0, 2.0)), captured(2, Random(draws=7), (2.0, 4.0))]
    mixed = mix(parts, shares=SHARES)
    assert mixed.temperatures == (2.0,)
    assert mixed.entropy.shape == (6, 1)
    with pytest.raises(CacheMismatchError, match=r"temperature 1 was not captured: these targets serve 2\."):
        mixed.weights(1.0)


def test_no_positions_are_a_mixture_too() -> None:
    empty = captured(1, Threshold(tau=1 / 8)).slice(0, 0)
    mixed = mix([empty, empty], shares=SHARES)
    assert (mixed.num_positions, mixed.num_entries, mixed.entropy.shape) == (0, 0, (0, 1))
    assert mixed.slice(0, 0).num_positions == 0


@pytest.mark.parametrize("shares", [(0.7, 0.4), (1.2, -0.2), (1.0,), (1.0, 0.0)])
def test_shares_are_above_zero_and_sum_to_one(shares: tuple[float, ...]) -> None:
    part = captured(1, Threshold(tau=1 / 8))
    with pytest.raises(ValueError, match="shares"):
        mix([part, part], shares=shares)
