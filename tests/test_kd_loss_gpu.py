"""The fused loss on an NVIDIA GPU: equal to the CPU's, wrong ids give NaN, the host never waits."""

from __future__ import annotations

import pytest
import torch

from shared.errors import RecipeError
from shared.kd_loss import KDLoss, ce_kd_by_position, chunk, fused_ce_kd
from shared.kd_loss.kept import highest
from shared.kd_loss.uncertainty import student_entropy
from shared.recipes.policies import Policy, TopK
from tests.test_kd_loss_fused import THRESHOLD, Problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_gpu(
    problem: Problem, *, device: str = "cuda", **options: object
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sums and the gradients by hidden states and head, brought back."""
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in (problem.hidden, problem.weight)]
    sums = fused_ce_kd(*inputs, problem.labels.to(device), problem.targets.to(device), **options)
    grads = torch.autograd.grad(sums.loss, inputs)
    return [value.detach().cpu() for value in sums], [grad.cpu() for grad in grads]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("policy", "tail"), [(THRESHOLD, "ghost"), (TopK(k=3), "uniform"), (TopK(k=3), "ghost")]
)
def test_equal_to_the_cpu(
    policy: Policy, tail: str, temperature: float, dtype: torch.dtype, tol: float
) -> None:
    problem = Problem(33, 1000, policy, dtype=dtype, hidden_size=64)
    problem.labels[5] = -100
    options = {"kd_ratio": 0.4, "temperature": temperature, "chunk_size": 8, "tail": tail}
    want = problem.fused(**options)
    want_grads = torch.autograd.grad(want.loss, [problem.hidden, problem.weight])
    got, got_grads = on_gpu(problem, **options)
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=tol, atol=tol)
    for grad, other in zip(got_grads, want_grads, strict=True):
        assert (grad.double() - other.double()).norm() < tol * other.double().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("policy", [THRESHOLD, TopK(k=3)])
def test_the_current_gpu_may_be_another(policy: Policy) -> None:
    problem = Problem(33, 1000, policy, dtype=torch.float32, hidden_size=64)
    assert torch.cuda.current_device() == 0
    for device in "cuda:0", "cuda:1":
        chunk._kernel.cache_clear()
        values, grads = on_gpu(problem, device=device, kd_ratio=0.4, chunk_size=8)
        assert chunk._kernel(torch.device(device)) is not None
        want = problem.fused(kd_ratio=0.4, chunk_size=8)
        for value, other in zip(values, want, strict=True):
            torch.testing.assert_close(value, other.detach(), rtol=1e-4, atol=1e-4)
        want_grads = torch.autograd.grad(want.loss, [problem.hidden, problem.weight])
        for grad, other in zip(grads, want_grads, strict=True):
            assert (grad.double() - other.double()).norm() < 1e-4 * other.double().norm()


@pytest.mark.parametrize(("policy", "tail"), [(THRESHOLD, "ghost"), (TopK(k=3), "ghost")])
def test_kept_positions_are_those_of_the_cpu(policy: Policy, tail: str) -> None:
    problem = Problem(33, 1000, policy, dtype=torch.float32, hidden_size=64)
    inputs = (problem.hidden.detach(), problem.weight.detach(), problem.labels)
    entropy = student_entropy(*inputs, chunk_size=8)
    found = student_entropy(*(one.cuda() for one in inputs), chunk_size=8)
    torch.testing.assert_close(found.cpu(), entropy, rtol=1e-4, atol=1e-4)
    index = highest(entropy, (13, 20), 0.3)
    assert torch.equal(highest(entropy.cuda(), (13, 20), 0.3).cpu(), index)
    factors = torch.zeros(33).index_fill(0, index, 3.0)
    options = {"kd_ratio": 0.4, "chunk_size": 8, "tail": tail}
    want = problem.fused(**options, kd_factors_N=factors)
    want_grads = torch.autograd.grad(want.loss, [problem.hidden, problem.weight])
    got, got_grads = on_gpu(problem, **options, kd_factors_N=factors.cuda())
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=1e-4, atol=1e-4)
    for grad, other in zip(got_grads, want_grads, strict=True):
        assert (grad.double() - other.double()).norm() < 1e-4 * other.double().norm()


def test_ratios_of_zero_need_no_targets() -> None:
    problem = Problem(3, 5, THRESHOLD)
    hidden, weight, labels = (one.detach().cuda() for one in (problem.hidden, problem.weight, problem.labels))
    assert float(fused_ce_kd(hidden, weight, labels, kd_ratio=torch.zeros(3, device="cuda")).kd) == 0
    with pytest.raises(RecipeError, match="but there are no targets"):
        fused_ce_kd(hidden, weight, labels, kd_ratio=torch.ones(3, device="cuda"))


def test_wrong_ids_give_nan() -> None:
    problem = Problem(4, 17, THRESHOLD, dtype=torch.float32)
    problem.labels[1] = 17
    assert bool(on_gpu(problem, kd_ratio=0.5)[0][0].isnan())
    problem.labels[1] = 0
    assert bool(on_gpu(problem, kd_ratio=0.5, num_vocab_ids=2)[0][0].isnan())


def test_wrong_ids_give_nan_at_their_positions() -> None:
    problem = Problem(4, 17, THRESHOLD, dtype=torch.float32)
    problem.labels[1] = 17
    inputs = [one.detach().cuda() for one in (problem.hidden, problem.weight, problem.labels)]
    targets = problem.targets.to("cuda")
    for found in ce_kd_by_position(*inputs, targets):
        assert found.isnan().tolist() == [False, True, False, False]
    inputs[2][1] = 0
    for found in ce_kd_by_position(*inputs, targets, num_vocab_ids=2):
        assert bool(found.isnan().all())


def test_wrong_ids_give_nan_from_logits() -> None:
    targets = Problem(4, 17, THRESHOLD, dtype=torch.float32).targets.to("cuda")
    logits, labels = torch.zeros(4, 2, device="cuda").requires_grad_(), torch.zeros(4).long().cuda()
    loss = KDLoss()(logits, targets, labels)
    assert bool(loss.isnan())
    assert bool(torch.autograd.grad(loss, logits)[0].isnan().all())


@pytest.mark.parametrize("policy", [THRESHOLD, TopK(k=3)])
def test_the_host_does_not_wait(policy: Policy) -> None:
    problem = Problem(20, 1000, policy, dtype=torch.bfloat16, hidden_size=64)
    on_gpu(
        problem, kd_ratio=0.5, temperature=2.0, chunk_size=8
    )  # compiles the kernel, and asks what addmm can
    hidden, weight = (tensor.detach().cuda().requires_grad_() for tensor in (problem.hidden, problem.weight))
    labels, targets = problem.labels.cuda(), problem.targets.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_ce_kd(
            hidden, weight, labels, targets, kd_ratio=0.5, temperature=2.0, chunk_size=8
        ).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
