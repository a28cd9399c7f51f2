"""Small masses: a student's outside, or at, the kept ids from 1e-1 to 1e-30, against 100 digits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from shared.errors import RecipeError
from shared.kd_loss import Divergence, KDLoss, fused_ce_kd
from shared.kd_loss.chunk import chunk_loss_torch_
from shared.kd_loss.divergences import FORWARD_KL
from shared.kd_loss.fused import _FusedLoss, _Work
from shared.kd_loss.positions import Positions
from shared.kd_loss.teacher import sparse_teacher
from shared.kd_loss.tile import LossSettings
from shared.recipes.policies import TopK
from shared.sparse import SparseTargets
from tests.kd_loss_tail_cases import GAPS, TAILS, TEACHERS, TailCase, assert_rows_agree, tail_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def fused(case: TailCase, *, kd_ratio: float, tail: str, kind: str, chunk_size: int) -> tuple[float, Tensor]:
    hidden = case.logits.clone().requires_grad_()
    sums = fused_ce_kd(
        hidden,
        torch.eye(hidden.shape[1], dtype=hidden.dtype),
        case.labels,
        case.targets,
        kd_ratio=kd_ratio,
        temperature=case.temperature,
        chunk_size=chunk_size,
        divergence=Divergence(kind),
        tail=tail,
    )
    return float(sums.loss.detach()), torch.autograd.grad(sums.loss, hidden)[0]


@pytest.mark.parametrize(("tail", "kind"), TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("small", ["outside", "kept"])
def test_kd_of_small_masses(tail: str, kind: str, dtype: torch.dtype, temperature: float, small: str) -> None:
    for teacher in TEACHERS:
        case = tail_case(dtype, temperature=temperature, teacher=teacher, small=small)
        want_loss, want = case.expected(kd_ratio=1.0, tail=tail, kind=kind)
        atol = 0.0 if tail == "ghost" else 1e-7  # linear ones: masses near one differ by an eps of one
        loss, grad = fused(case, kd_ratio=1.0, tail=tail, kind=kind, chunk_size=4)
        assert loss == pytest.approx(want_loss, rel=1e-6, abs=1e-6)
        assert_rows_agree(grad, want, dtype, atol=atol)
        logits = case.logits.clone().requires_grad_()
        kd_loss = KDLoss(temperature=temperature, chunk_size=4, divergence=Divergence(kind), tail=tail)
        kd = kd_loss(logits, case.targets, case.labels, num_batch_labels=1)
        assert float(kd.detach()) == pytest.approx(want_loss, rel=1e-6, abs=1e-6)
        assert_rows_agree(torch.autograd.grad(kd, logits)[0], want, dtype, atol=atol)


@pytest.mark.parametrize(("tail", "kind"), TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_beside_cross_entropy(tail: str, kind: str, temperature: float) -> None:
    for dtype, small in itertools.product(DTYPES, ("outside", "kept")):
        case = tail_case(dtype, temperature=temperature, teacher="unsure", small=small)
        want_loss, want = case.expected(kd_ratio=0.3, tail=tail, kind=kind)
        loss, grad = fused(case, kd_ratio=0.3, tail=tail, kind=kind, chunk_size=4)
        assert loss == pytest.approx(want_loss, rel=1e-6, abs=1e-6)
        assert_rows_agree(grad, want, dtype, atol=2e-7 if dtype != torch.float64 else 1e-15)


@pytest.mark.parametrize("gap", [80.0, 90.0, 300.0, 3000.0])
def test_the_bucket_never_stops_growing(gap: float) -> None:
    """Where the mass outside has no fp32 number any more, loss and gradient still have."""
    logits = torch.tensor([[gap, 0.0, 0.5]], requires_grad=True)
    sums = fused_ce_kd(logits, torch.eye(3), torch.tensor([0]), one_entry(0.9), kd_ratio=1.0, tail="ghost")
    grad = torch.autograd.grad(sums.loss, logits)[0]
    assert float(sums.kd) == pytest.approx(0.9 * -0.10536 + 0.1 * (-2.30259 + gap - 0.97408), abs=2e-4 * gap)
    torch.testing.assert_close(grad, torch.tensor([[0.1, -0.0377541, -0.0622459]]), rtol=1e-3, atol=0)


def one_entry(mass: float) -> SparseTargets:
    return tail_case_of([0], [mass])


def another_of(logprob: float) -> SparseTargets:
    targets = tail_case_of([0, 1], [0.9, 1.0])
    targets.logprobs[1] = logprob
    return targets


def tail_case_of(ids: list[int], masses: list[float]) -> SparseTargets:
    return SparseTargets(
        offsets=torch.tensor([0, len(ids)]),
        ids=torch.tensor(ids, dtype=torch.int32),
        logprobs=torch.tensor(masses, dtype=torch.float64).log().half(),
        policy=TopK(k=max(1, len(ids))),
        temperatures=(1.0,),
        log_normalizers=torch.zeros(1, 0),
        entropy=torch.zeros(1, 1),
        draw_counts=torch.zeros(0, dtype=torch.int32),
    )


@pytest.mark.parametrize("tail", ["ghost", "renormalize", "drop"])
def test_a_row_without_entries_says_nothing(tail: str) -> None:
    logits = torch.tensor([[3.0, 0.0, 0.5]], requires_grad=True)
    empty = tail_case_of([], [])
    sums = fused_ce_kd(logits, torch.eye(3), torch.tensor([0]), empty, kd_ratio=1.0, tail=tail)
    assert float(sums.loss.detach()) == 0
    assert bool((torch.autograd.grad(sums.loss, logits)[0] == 0).all())


@pytest.mark.parametrize("tail", ["ghost", "uniform"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_an_excluded_rest(kind: str, tail: str) -> None:
    """Logits of -inf at all other ids: gradients are finite; KL from the teacher alone is infinite.

    Only even mass on these ids (``uniform``, of forward KL) asks for more of them.
    """
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], requires_grad=True)
    loss = KDLoss(divergence=Divergence(kind), chunk_size=1, tail=tail)(
        logits, tail_case_of([0, 1], [0.3, 0.6]), torch.tensor([0])
    )
    grad = torch.autograd.grad(loss, logits)[0]
    assert bool(grad.isfinite().all())
    asked = -0.05 if (kind, tail) == ("forward_kl", "uniform") else 0.0
    torch.testing.assert_close(grad[0, 2:], torch.full((2,), asked), rtol=1e-2, atol=0)
    assert bool(loss.detach().isinf()) == (kind == "forward_kl")


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_masses_of_the_teacher_that_underflow(kind: str) -> None:
    """Their logs do not: loss and gradient in fp32 are those of fp64, and finite where fp64 has no such mass."""
    logits, ids, targets = torch.tensor([[1.0, 2.0, 0.5, 0.0]]), torch.tensor([0]), another_of(-120.0)

    def value_and_grad(dtype: torch.dtype, targets: SparseTargets) -> tuple[Tensor, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        loss = KDLoss(divergence=Divergence(kind), chunk_size=1)(leaf, targets, ids)
        return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()

    got, want = value_and_grad(torch.float32, targets), value_and_grad(torch.float64, targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    value, grad = value_and_grad(torch.float64, another_of(-2000.0))
    assert bool(value.isfinite() & grad.isfinite().all())


def test_what_is_left_of_a_sure_teacher() -> None:
    """The rest of log-probs near zero, 1 - exp(-2e-6), has three digits in fp32 if it is taken from one."""
    targets = one_entry(1.0)
    targets.logprobs[0] = -2e-6
    rows = sparse_teacher(
        targets, temperature=1.0, divergence=FORWARD_KL, tail="ghost", num_vocab_ids=3, dtype=torch.float32
    ).rows
    assert rows.rest_N is not None
    assert float(rows.rest_N) == pytest.approx(-float(targets.logprobs[0]), rel=1e-5)


def test_the_slope_of_a_saturated_cap() -> None:
    """1 - tanh(7)**2 has one digit in fp32."""
    logits = torch.tensor([[35.0, 0.0]])
    settings = LossSettings(0.0, 1.0, 2, softcap=5.0)
    chunk_loss_torch_(logits, torch.tensor([1]), None, None, 0, settings, with_grad=True)
    wide = torch.tensor([[35.0, 0.0]], dtype=torch.float64)
    chunk_loss_torch_(wide, torch.tensor([1]), None, None, 0, settings, with_grad=True)
    torch.testing.assert_close(logits.double(), wide, rtol=1e-5, atol=0)


def test_large_logits_keep_their_digits() -> None:
    """A common level of 1000 costs the CE of a sure student nothing; lse - z would be off by 6e-5."""
    logits = torch.tensor([[1008.0, 1000.0]])
    ce, _ = chunk_loss_torch_(
        logits, torch.tensor([0]), None, None, 0, LossSettings(0.0, 1.0, 2), with_grad=False
    )
    assert float(ce) == pytest.approx(3.354e-4, rel=1e-3)


def test_what_is_ignored_goes_nowhere_where_rows_are_not_left_out() -> None:
    """As on a GPU: rows that do not count stay, with a weight of zero, whatever lies in them."""
    hidden = torch.tensor([[torch.nan, 1.0], [1.0, 0.0], [torch.inf, 0.0]], requires_grad=True)
    weight = torch.eye(3, 2).requires_grad_()
    bias = torch.tensor([-torch.inf, 0.0, 0.0])  # an ignored row's label stands as 0
    positions = Positions(
        hidden, torch.tensor([0, 1, 0]), torch.tensor([0.0, 1.0, 0.0]), None, torch.tensor(1)
    )
    work = _Work(positions, lambda start, stop: (None, 0), LossSettings(0.0, 1.0, 3), 2, with_grad=True)
    loss, ce, *_ = _FusedLoss.apply(hidden, weight, bias, work)
    grads = torch.autograd.grad(loss, [hidden, weight])
    alone = hidden.detach()[1:2].requires_grad_()
    want = fused_ce_kd(alone, weight, torch.tensor([1]), kd_ratio=0.0, bias_V=bias)
    torch.testing.assert_close((loss, ce), (want.loss, want.ce))
    want_grads = torch.autograd.grad(want.loss, [alone, weight])
    torch.testing.assert_close(grads[0], torch.stack([torch.zeros(2), want_grads[0][0], torch.zeros(2)]))
    torch.testing.assert_close(grads[1], want_grads[1])


@pytest.mark.parametrize("ids", [[1, 1], [2, 1]])
def test_ids_that_do_not_rise_are_refused(ids: list[int]) -> None:
    logits, targets = torch.zeros(1, 3), tail_case_of(ids, [0.5, 0.4])
    with pytest.raises(ValueError, match=f"position 0 has id 1 after {ids[0]}"):
        fused_ce_kd(logits, torch.eye(3), torch.tensor([0]), targets, kd_ratio=1.0)
    with pytest.raises(ValueError, match="rising order"):
        KDLoss()(logits, targets, torch.tensor([0]))


@pytest.mark.parametrize("temperature", [torch.inf, torch.nan, 0.0, -1.0])
def test_temperatures_that_are_no_temperatures(temperature: float) -> None:
    with pytest.raises(RecipeError, match="must be a number above 0"):
        KDLoss(temperature=temperature)
    with pytest.raises(RecipeError, match="must be a number above 0"):
        fused_ce_kd(torch.zeros(1, 3), torch.eye(3), torch.tensor([0]), kd_ratio=0.0, temperature=temperature)


def test_the_gaps_reach_as_far_as_they_say() -> None:
    assert math.exp(-GAPS[0]) > 0.1
    assert math.exp(-GAPS[-1]) < 1e-30
