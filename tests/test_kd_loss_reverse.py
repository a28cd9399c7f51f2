"""Sampled reverse KL: its gradient is that of KL(q || p) on average over what the student draws, in any dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import RecipeError
from shared.kd_loss import fused_ce_kd
from shared.recipes.policies import Policy, Threshold, TopK
from shared.sparse import position_seeds, sparsify

N, D, V = 3, 5, 7
NAN = float("nan")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head, and the teacher's log-probs (N, V)."""
    hidden, head = drawn(N, D, seed=0).to(dtype), drawn(V, D, seed=1).to(dtype)
    return hidden.requires_grad_(), head.requires_grad_(), (2 * drawn(N, V, seed=2)).log_softmax(-1)


def student(hidden: Tensor, head: Tensor, softcap: float | None = None) -> Tensor:
    """Its log-probs (N, V)."""
    logits = hidden @ head.T
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [4, 512])
def test_in_expectation_it_is_the_exact_reverse_kl(softcap: float | None, chunk_size: int) -> None:
    """Over every token that could be drawn, each by its probability; CE's gradient is then zero."""
    hidden, head, teacher = given()
    logq = student(hidden, head, softcap)
    exact = (logq.exp() * (logq - teacher)).sum()
    want = torch.autograd.grad(exact, [hidden, head])
    sums = fused_ce_kd(
        hidden.repeat_interleave(V, 0),
        head,
        torch.arange(V).repeat(N),
        kd_ratio=0.0,
        softcap=softcap,
        weights_N=student(hidden, head, softcap).detach().exp().flatten(),
        reverse_kl=1.0,
        label_logprobs_N=teacher.flatten(),
        chunk_size=chunk_size,
    )
    assert sums.reverse_kl.item() == pytest.approx(exact.item(), rel=1e-6)  # weights and log-probs are fp32
    for ours, theirs in zip(torch.autograd.grad(sums.loss, [hidden, head]), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def targets_of(teacher: Tensor, policy: Policy, temperature: float) -> Any:
    seeds = position_seeds(0, b"key", N)
    return sparsify(teacher.float(), policy, temperatures=(temperature,), seeds=seeds)


@pytest.mark.parametrize(
    ("policy", "temperature"), [(Threshold(tau=0.05), 1.0), (Threshold(tau=0.05), 2.0), (TopK(k=2), 1.0)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_beside_ce_and_kd_it_adds_its_own_gradient(
    policy: Policy, temperature: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Of the labels that were drawn, (log q(y) - log p(y)) times the gradient of log q(y); nothing of the others."""
    hidden, head, teacher = given(dtype)
    labels, own = torch.tensor([2, 0, 5]), torch.tensor([True, False, True])
    logprobs = teacher.gather(1, labels[:, None]).squeeze(1)
    settings: dict[str, Any] = {
        "targets": targets_of(teacher, policy, temperature),
        "kd_ratio": 0.3,
        "temperature": temperature,
    }
    without = fused_ce_kd(hidden, head, labels, **settings)
    label_logprobs = torch.where(own, logprobs, NAN)
    sums = fused_ce_kd(hidden, head, labels, **settings, reverse_kl=0.7, label_logprobs_N=label_logprobs)
    wide = [one.detach().double().requires_grad_() for one in (hidden, head)]
    logq_y = student(*wide).gather(1, labels[:, None]).squeeze(1)
    log_ratio = (logq_y - logprobs).detach()
    extra = torch.autograd.grad((0.7 * log_ratio * logq_y)[own].sum(), wide)
    grads = [torch.autograd.grad(one.loss, [hidden, head]) for one in (sums, without)]
    for ours, others, more in zip(*grads, extra, strict=True):
        torch.testing.assert_close(ours.double(), others.double() + more, rtol=tolerance, atol=tolerance)
    assert float(sums.reverse_kl) == pytest.approx(float(log_ratio[own].sum()), rel=10 * tolerance)
    together = without.loss + 0.7 * sums.reverse_kl
    assert sums.loss.item() == pytest.approx(together.item(), rel=1e-5)
    assert (int(sums.num_positions), int(sums.num_drawn)) == (3, 2)
    assert (float(sums.ce), float(sums.kd)) == (float(without.ce), float(without.kd))


def test_where_it_is_off_nothing_changes() -> None:
    hidden, head, _ = given(torch.float32)
    labels = torch.tensor([2, -100, 5])
    logprobs = torch.tensor([-1.0, -2.0, NAN])
    plain = fused_ce_kd(hidden, head, labels, kd_ratio=0.0)
    off = fused_ce_kd(hidden, head, labels, kd_ratio=0.0, label_logprobs_N=logprobs)
    assert torch.equal(plain.loss, off.loss)
    assert torch.autograd.grad(plain.loss, [hidden])[0].equal(torch.autograd.grad(off.loss, [hidden])[0])
    assert (int(plain.num_drawn), int(off.num_drawn)) == (0, 1)  # an ignored label counts nowhere
    assert float(plain.reverse_kl) == 0.0


def test_the_estimate_of_many_samples_comes_near() -> None:
    """What a run does: tokens are drawn from the student, and each counts once."""
    hidden, head, teacher = given()
    logq = student(hidden, head)
    exact = (logq.exp() * (logq - teacher)).sum()
    want = torch.autograd.grad(exact, [hidden], retain_graph=True)[0]
    num_draws = 4000
    labels = torch.multinomial(
        logq.detach().exp(), num_draws, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    rows = torch.arange(N).repeat_interleave(num_draws)
    labels = labels.flatten()
    sums = fused_ce_kd(
        hidden[rows], head, labels, kd_ratio=0.0, reverse_kl=1.0, label_logprobs_N=teacher[rows, labels]
    )
    got = torch.autograd.grad(sums.loss, [hidden])[0] / num_draws
    assert float((got - want).norm() / want.norm()) < 0.1


def test_what_is_missing_or_out_of_range_is_said() -> None:
    hidden, head, _ = given()
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(RecipeError, match=r"reverse_kl is 0\.5 but there are no log-probs of the labels"):
        fused_ce_kd(hidden, head, labels, kd_ratio=0.0, reverse_kl=0.5)
    with pytest.raises(RecipeError, match="it must be a number, 0 or above"):
        fused_ce_kd(hidden, head, labels, kd_ratio=0.0, reverse_kl=-1.0, label_logprobs_N=torch.zeros(3))
    with pytest.raises(ValueError, match=r"have \[3, 3, 2\] positions"):
        fused_ce_kd(hidden, head, labels, kd_ratio=0.0, reverse_kl=1.0, label_logprobs_N=torch.zeros(2))
