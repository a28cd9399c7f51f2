"""``fused_ce_kd`` against the slow reference: value and gradient, shapes, dtypes, policies, properties."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shared.errors import CacheMismatchError, RecipeError
from shared.kd_loss import Divergence, LossSums, ce_kd_by_position, chunk, fused_ce_kd, gradients
from shared.kd_loss.positions import counted_positions
from shared.kd_loss.tile import LossSettings
from shared.recipes.policies import DEFAULT_TAIL, Policy, Random, Threshold, TopK, TopP
from shared.sparse import SparseTargets, position_seeds, sparsify
from tests import reference_losses as reference

THRESHOLD = Threshold(tau=0.1)
IGNORED = -100


class Problem:
    """Inputs of one loss, and what the reference makes of them."""

    def __init__(
        self,
        num_positions: int,
        num_ids: int,
        policy: Policy,
        *,
        dtype: torch.dtype = torch.float64,
        hidden_size: int = 5,
        seed: int = 0,
        num_padding_ids: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = randn(num_positions, hidden_size).to(dtype).requires_grad_()
        self.weight = randn(num_ids, hidden_size).to(dtype).requires_grad_()
        self.bias = randn(num_ids).to(dtype).requires_grad_()
        self.labels = torch.randint(num_ids, (num_positions,), generator=generator)
        self.weights = torch.rand(num_positions, generator=generator)
        self.teacher = 2 * randn(num_positions, num_ids).float()
        self.teacher[:, num_ids - num_padding_ids :] = -torch.inf
        self.targets = sparsify(
            self.teacher.log_softmax(-1),
            policy,
            temperatures=(1.0, 2.0),
            seeds=position_seeds(seed, b"key", num_positions),
        )

    def fused(self, **options: object) -> LossSums:
        return fused_ce_kd(self.hidden, self.weight, self.labels, self.targets, **options)

    def expected(
        self,
        *,
        kd_ratio: float | Tensor,
        temperature: float = 1.0,
        bias: bool = False,
        softcap: float | None = None,
        weights: bool = False,
        tail: str = DEFAULT_TAIL,
        kind: str = "forward_kl",
        beta: float = 0.5,
        num_vocab_ids: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Loss, CE, KD, and the loss's gradients by hidden states, weight, bias; in fp64."""
        inputs = [t.detach().double().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        logits = reference.head_logits(inputs[0], inputs[1], inputs[2] if bias else None, softcap)
        loss = ce = kd = (inputs[0].sum() + inputs[1].sum() + inputs[2].sum()) * 0
        ratios = torch.as_tensor(kd_ratio, dtype=torch.float64).expand(len(self.labels)).tolist()
        masses, offsets = self.targets.weights(temperature), self.targets.offsets.tolist()
        column = self.targets.temperatures.index(temperature)
        for n, label in enumerate(self.labels.tolist()):
            if label == IGNORED:
                continue
            factor = float(self.weights[n]) if weights else 1.0
            ids, mass = self.targets.ids[offsets[n] : offsets[n + 1]], masses[offsets[n] : offsets[n + 1]]
            ce_n = factor * reference.cross_entropy(logits[n], label)
            if self.targets.policy.is_sampled:
                entropy = self.targets.entropy[n, column]
                kd_n = factor * reference.sampled_kd(logits[n], ids, mass, entropy, temperature)
            else:
                kd_n = factor * reference.truncated_kd(
                    logits[n], ids, mass, temperature, tail, kind=kind, beta=beta, num_vocab_ids=num_vocab_ids
                )
            ce, kd = ce + ce_n, kd + kd_n
            loss = loss + (1 - ratios[n]) * ce_n + ratios[n] * kd_n
        return loss.detach(), ce.detach(), kd.detach(), list(torch.autograd.grad(loss, inputs))


def assert_close(
    sums: LossSums, problem: Problem, expected: tuple, *, bias: bool = False, tol: float = 1e-6
) -> None:
    """Masses of targets are fp32 numbers that both sides read; sums are compared relative to their size."""
    loss, ce, kd, grads = expected
    scale = max(1.0, abs(float(ce)), abs(float(kd)))
    for got, want in ((sums.loss, loss), (sums.ce, ce), (sums.kd, kd)):
        assert abs(float(got.detach()) - float(want)) <= tol * scale
    inputs = [problem.hidden, problem.weight] + ([problem.bias] if bias else [])
    got_grads = torch.autograd.grad(sums.loss, inputs, retain_graph=True)
    for got, want, source in zip(got_grads, grads, inputs, strict=False):
        assert got.dtype == source.dtype
        assert (got.double() - want).norm() <= tol * max(1.0, float(want.norm()))


SHAPES = [(1, 4, 17), (3, 8, 17), (7, 3, 17), (8, 4, 33), (5, 2, 1), (6, 512, 2)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_positions", "chunk_size", "num_ids"), SHAPES)
def test_value_and_gradient(
    num_positions: int, chunk_size: int, num_ids: int, kd_ratio: float, temperature: float
) -> None:
    problem = Problem(num_positions, num_ids, THRESHOLD)
    sums = problem.fused(kd_ratio=kd_ratio, temperature=temperature, chunk_size=chunk_size)
    assert_close(sums, problem, problem.expected(kd_ratio=kd_ratio, temperature=temperature), tol=1e-9)
    assert sums.num_positions == num_positions


POLICIES = [
    (policy, tail, kind)
    for policy in (TopK(k=3), TopP(p=0.8))
    for tail, kind in [
        *itertools.product(["ghost", "uniform", "renormalize", "drop"], ["forward_kl"]),
        *itertools.product(["ghost"], ["reverse_kl", "jensen_shannon", "total_variation"]),
    ]
] + [(THRESHOLD, "ghost", "forward_kl"), (Random(draws=6), "ghost", "forward_kl")]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("policy", "tail", "kind"), POLICIES)
def test_policies_tails_divergences(policy: Policy, tail: str, kind: str, temperature: float) -> None:
    """With every option on: bias, soft-capping, weights, ignored labels, a head wider than the tokenizer."""
    problem = Problem(7, 19, policy, num_padding_ids=3)
    problem.labels[torch.tensor([0, 4])] = IGNORED
    problem.weights[2] = 0
    num_vocab_ids = 16 if tail == "uniform" else 19
    sums = problem.fused(
        kd_ratio=0.4,
        temperature=temperature,
        chunk_size=2,
        bias_V=problem.bias,
        softcap=3.0,
        tail=tail,
        divergence=Divergence(kind, 0.3),
        weights_N=problem.weights,
        num_vocab_ids=num_vocab_ids,
    )
    expected = problem.expected(
        kd_ratio=0.4,
        temperature=temperature,
        bias=True,
        softcap=3.0,
        weights=True,
        tail=tail,
        kind=kind,
        beta=0.3,
        num_vocab_ids=num_vocab_ids,
    )
    assert_close(sums, problem, expected, bias=True)
    assert sums.num_positions == 4


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dtypes(dtype: torch.dtype, tol: float, temperature: float) -> None:
    problem = Problem(33, 50, THRESHOLD, dtype=dtype)
    sums = problem.fused(kd_ratio=0.5, temperature=temperature, chunk_size=8)
    assert sums.loss.dtype == torch.float32
    assert_close(sums, problem, problem.expected(kd_ratio=0.5, temperature=temperature), tol=tol)


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 512), TopK(k=100)])
def test_a_large_vocabulary(policy: Policy) -> None:
    problem = Problem(3, 248_320, policy, dtype=torch.float32, hidden_size=4)
    sums = problem.fused(kd_ratio=0.5, temperature=2.0, chunk_size=2, tail="uniform")
    expected = problem.expected(kd_ratio=0.5, temperature=2.0, tail="uniform")
    assert_close(sums, problem, expected, tol=2e-5)


@pytest.mark.parametrize(
    "labels", [[IGNORED] * 5, [1, IGNORED, IGNORED, IGNORED, 2], [IGNORED, 0, 1, 2, IGNORED]]
)
def test_ignored_labels(labels: list[int]) -> None:
    problem = Problem(5, 17, THRESHOLD)
    problem.labels = torch.tensor(labels)
    sums = problem.fused(kd_ratio=0.5, chunk_size=2)
    assert_close(sums, problem, problem.expected(kd_ratio=0.5), tol=1e-9)
    assert sums.num_positions == sum(label != IGNORED for label in labels)


def test_no_positions_give_a_zero_with_a_graph() -> None:
    problem = Problem(4, 17, THRESHOLD)
    problem.labels[:] = IGNORED
    for sums in (
        problem.fused(kd_ratio=0.5),
        fused_ce_kd(
            problem.hidden[:0], problem.weight, problem.labels[:0], problem.targets.slice(0, 0), kd_ratio=0.5
        ),
    ):
        assert float(sums.loss.detach()) == 0 == int(sums.num_positions)
        grads = torch.autograd.grad(sums.loss, [problem.hidden, problem.weight])
        assert all(float(grad.abs().sum()) == 0 for grad in grads)


def test_nan_of_an_ignored_position_stays_there() -> None:
    problem = Problem(4, 17, THRESHOLD)
    problem.labels[1] = IGNORED
    with torch.no_grad():
        problem.hidden[1] = torch.nan
    sums = problem.fused(kd_ratio=0.5)
    grads = torch.autograd.grad(sums.loss, [problem.hidden, problem.weight])
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_ce_alone_needs_no_targets() -> None:
    problem = Problem(9, 17, THRESHOLD)
    sums = fused_ce_kd(problem.hidden, problem.weight, problem.labels, kd_ratio=0.0, chunk_size=4)
    want = F.cross_entropy(problem.hidden @ problem.weight.T, problem.labels, reduction="sum")
    torch.testing.assert_close(sums.loss, want)
    assert float(sums.kd) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("policy", [THRESHOLD, TopK(k=3)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(policy: Policy, temperature: float, softcap: float | None) -> None:
    problem = Problem(5, 7, policy, hidden_size=3)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_ce_kd(
            hidden,
            weight,
            problem.labels,
            problem.targets,
            kd_ratio=0.3,
            temperature=temperature,
            chunk_size=2,
            bias_V=bias,
            softcap=softcap,
            weights_N=problem.weights,
        ).loss

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.weight, problem.bias))


def equal_distributions(policy: Policy, seed: int) -> Problem:
    """A student that is its teacher."""
    problem = Problem(64, 40, policy, seed=seed)
    problem.teacher = (problem.hidden @ problem.weight.T).detach().float()
    problem.targets = sparsify(
        problem.teacher.log_softmax(-1),
        policy,
        temperatures=(1.0, 2.0),
        seeds=position_seeds(seed, b"key", 64),
    )
    return problem


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_zero_for_equal_distributions(kind: str, temperature: float) -> None:
    """Up to the targets' fp16: a relative error of 2**-9 or so in each mass."""
    problem = equal_distributions(TopK(k=40), 0)
    kd = problem.fused(kd_ratio=1.0, temperature=temperature, divergence=Divergence(kind)).kd / 64
    assert abs(float(kd)) < (5e-3 if kind == "total_variation" else 1e-4) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("policy", [THRESHOLD, Random(draws=10)])
def test_zero_in_expectation_for_equal_distributions(policy: Policy, temperature: float) -> None:
    values = torch.stack(
        [
            equal_distributions(policy, seed).fused(kd_ratio=1.0, temperature=temperature).kd / 64
            for seed in range(40)
        ]
    )
    standard_error = values.std() / 40**0.5
    assert abs(values.mean()) < 4 * standard_error
    assert standard_error < 0.05 * temperature**2


@pytest.mark.parametrize("each", [False, True], ids=["one ratio", "a ratio each"])
def test_an_infinite_loss_that_has_no_part_adds_nothing(each: bool) -> None:
    """CE of a label that the head excludes, KD of a teacher's token; where both count, the loss is infinite."""
    problem = Problem(1, 5, TopK(k=2))
    kept = problem.targets.ids.tolist()
    other = next(number for number in range(5) if number not in kept)
    problem.labels[0] = other

    def sums(kd_ratio: float, excluded: int, **options: object) -> LossSums:
        bias = torch.zeros(5, dtype=torch.float64)
        bias[excluded] = -torch.inf
        return problem.fused(kd_ratio=torch.tensor([kd_ratio]) if each else kd_ratio, bias_V=bias, **options)

    ce_alone, kd_alone, both = sums(0.0, kept[0]), sums(1.0, other), sums(0.5, other)
    assert (ce_alone.loss, bool(ce_alone.kd.isinf())) == (ce_alone.ce, True)
    assert (kd_alone.loss, bool(kd_alone.ce.isinf())) == (kd_alone.kd, True)
    assert both.loss.isinf()
    drawn = sums(1.0, other, label_logprobs_N=torch.zeros(1))
    assert drawn.loss == kd_alone.loss
    no_kd = sums(0.5, kept[0], kd_factors_N=torch.zeros(1))
    assert no_kd.loss == 0.5 * no_kd.ce
    for found in (ce_alone, kd_alone, drawn, no_kd):
        assert torch.autograd.grad(found.loss, problem.hidden)[0].isfinite().all()


def test_gradient_of_kl_is_that_of_soft_cross_entropy() -> None:
    problem = Problem(6, 17, TopK(k=17))
    grad_kl = torch.autograd.grad(problem.fused(kd_ratio=1.0).loss, problem.hidden)[0]
    dense = torch.zeros(6, 17, dtype=torch.float64)
    dense[problem.targets.position_index, problem.targets.ids.long()] = problem.targets.weights().double()
    logq = (problem.hidden @ problem.weight.T).log_softmax(-1)
    grad_ce = torch.autograd.grad(-(dense * logq).sum(), problem.hidden)[0]
    torch.testing.assert_close(grad_kl, grad_ce, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(
    num_positions=st.integers(1, 12),
    chunk_size=st.integers(1, 14),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([1.0, 2.0]),
    policy=st.sampled_from([THRESHOLD, TopK(k=2), TopP(p=0.5)]),
)
def test_chunks_and_order_do_not_matter(
    num_positions: int, chunk_size: int, seed: int, temperature: float, policy: Policy
) -> None:
    problem = Problem(num_positions, 17, policy, seed=seed)
    whole = problem.fused(kd_ratio=0.4, temperature=temperature, chunk_size=num_positions)
    order = torch.randperm(num_positions, generator=torch.Generator().manual_seed(seed))
    chunked = fused_ce_kd(
        problem.hidden[order],
        problem.weight,
        problem.labels[order],
        problem.targets.select(order),
        kd_ratio=0.4,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    for got, want in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got.detach(), want.detach())
    inputs = [problem.hidden, problem.weight]
    for got, want in zip(*(torch.autograd.grad(s.loss, inputs) for s in (chunked, whole)), strict=True):
        torch.testing.assert_close(got, want)


def test_logits_may_be_shifted() -> None:
    """Kept weights that do not sum to one must not turn the logits' common level into loss or gradient."""
    problem = Problem(8, 17, Random(draws=5))
    total = torch.zeros(8).index_add_(0, problem.targets.position_index, problem.targets.weights(2.0))
    assert (total - 1).abs().max() > 0.01
    low, high = (
        problem.fused(kd_ratio=1.0, temperature=2.0, bias_V=problem.bias + shift) for shift in (0.0, 50.0)
    )
    torch.testing.assert_close(low.kd, high.kd)
    assert abs(float(torch.autograd.grad(low.loss, problem.bias)[0].sum())) < 1e-9


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_logits_of_the_whole_batch(temperature: float) -> None:
    problem = Problem(64, 300, THRESHOLD, dtype=torch.float32, hidden_size=4)
    with Largest() as largest:
        problem.fused(kd_ratio=0.5, temperature=temperature, chunk_size=8).loss.backward()
    assert largest.numel == 8 * 300


def test_frozen_inputs_cost_nothing() -> None:
    """No gradient of a frozen head, and none of anything under ``no_grad``: hidden size above chunk size."""
    problem = Problem(12, 300, THRESHOLD, dtype=torch.float32, hidden_size=40)
    options = {"kd_ratio": 0.5, "chunk_size": 4}
    want = problem.fused(**options)
    with torch.no_grad(), Largest() as largest:
        got = problem.fused(**options)
    assert largest.numel == 300 * 40  # the transposed head, a view
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, want.loss.detach())
    (want_grad,) = torch.autograd.grad(want.loss, problem.hidden)
    problem.weight.requires_grad_(False)
    frozen = problem.fused(**options)
    assert [saved is None for saved in frozen.loss.grad_fn.saved_tensors] == [False, True]  # no bias either
    torch.testing.assert_close(torch.autograd.grad(frozen.loss, problem.hidden)[0], want_grad)
    problem.weight.requires_grad_(True)
    problem.hidden.requires_grad_(False)
    head_only = problem.fused(**options)
    assert [saved is None for saved in head_only.loss.grad_fn.saved_tensors] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autograd_may_ask_twice_and_scale(dtype: torch.dtype) -> None:
    problem = Problem(6, 17, THRESHOLD, dtype=dtype)
    inputs = [problem.hidden, problem.weight]
    once = torch.autograd.grad(problem.fused(kd_ratio=0.5).loss, inputs)
    loss = problem.fused(kd_ratio=0.5).loss
    first = torch.autograd.grad(0.5 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    for a, b, c in zip(once, first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)
        torch.testing.assert_close(3 * a, c, rtol=1e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_second_order_terms_are_refused_not_dropped() -> None:
    problem = Problem(5, 13, THRESHOLD)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(problem.fused(kd_ratio=0.5).loss, problem.hidden, create_graph=True)


@pytest.mark.parametrize("way", ["reentrant", "recomputed", "compiled"])
def test_a_gradient_asked_for_in_other_ways_is_the_same(way: str) -> None:
    problem = Problem(5, 13, THRESHOLD)
    (want,) = torch.autograd.grad(problem.fused(kd_ratio=0.5).loss, problem.hidden)

    def loss(hidden: Tensor) -> Tensor:
        return fused_ce_kd(hidden, problem.weight, problem.labels, problem.targets, kd_ratio=0.5).loss

    if way == "compiled":
        got = torch.compile(loss, backend="eager")(problem.hidden)
    else:
        got = checkpoint(loss, problem.hidden, use_reentrant=way == "reentrant")
    got.backward()
    assert torch.equal(problem.hidden.grad, want)


def test_gradients_accumulate_over_microbatches() -> None:
    problem = Problem(8, 17, THRESHOLD)
    problem.fused(kd_ratio=0.5).loss.backward()
    want = problem.weight.grad.clone()
    problem.weight.grad = None
    for part in (slice(0, 3), slice(3, 8)):
        targets = problem.targets.slice(part.start, part.stop)
        fused_ce_kd(
            problem.hidden[part], problem.weight, problem.labels[part], targets, kd_ratio=0.5
        ).loss.backward()
    torch.testing.assert_close(problem.weight.grad, want)


def test_narrowing_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_BLOCK", 4)
    for numel in (1, 4, 5, 8, 9, 100, 1000):
        wide = torch.randn(numel, 3)
        want = wide.to(torch.bfloat16)
        address = wide.data_ptr()
        narrow = gradients.narrow_(wide, torch.bfloat16)
        assert torch.equal(narrow, want)
        assert narrow.data_ptr() == address


@pytest.mark.parametrize("num_ids", [1, 16, 17, 33, 1000])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asks_again", [False, True])
def test_a_narrow_head_s_gradient_does_not_hold_the_fp32_sum(
    num_ids: int, hidden_dtype: torch.dtype, asks_again: bool
) -> None:
    problem = Problem(20, num_ids, THRESHOLD, dtype=torch.bfloat16, hidden_size=8)
    hidden, weight = (
        problem.hidden.detach().to(hidden_dtype),
        problem.weight.detach().to(hidden_dtype).requires_grad_(),
    )
    fused_ce_kd(hidden, weight, problem.labels, problem.targets, kd_ratio=0.5, chunk_size=7).loss.backward()
    want = weight.grad.to(torch.bfloat16)

    narrow = problem.weight.detach().to(torch.bfloat16).requires_grad_()
    sums = fused_ce_kd(hidden, narrow, problem.labels, problem.targets, kd_ratio=0.5, chunk_size=7)
    sums.loss.backward(retain_graph=asks_again)
    if asks_again:
        narrow.grad = None
        sums.loss.backward()
    assert torch.equal(narrow.grad, want)
    of_rows = 2 * hidden.shape[1]
    assert narrow.grad.untyped_storage().nbytes() <= of_rows * (num_ids + 31)  # halves begin at an even place


def test_head_gradient_is_summed_in_fp32() -> None:
    """In bf16 a sum of 512 equal numbers stops growing at 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    sums = fused_ce_kd(hidden, weight, torch.zeros(512, dtype=torch.int64), kd_ratio=0.0, chunk_size=1)
    sums.loss.backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


def test_autocast() -> None:
    """As if hidden states and head had been cast, but for the head's gradient, which stays in fp32."""
    problem = Problem(20, 17, THRESHOLD, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = problem.fused(kd_ratio=0.5, chunk_size=8)
    assert sums.loss.dtype == torch.float32
    grads = torch.autograd.grad(sums.loss, [problem.hidden, problem.weight])
    cast = Problem(20, 17, THRESHOLD, dtype=torch.bfloat16)
    want = cast.fused(kd_ratio=0.5, chunk_size=8)
    torch.testing.assert_close(sums.loss, want.loss)
    for got, source in zip(grads, torch.autograd.grad(want.loss, [cast.hidden, cast.weight]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, source.float(), rtol=1e-2, atol=1e-2)
    assert not torch.equal(grads[1], grads[1].bfloat16().float())


def test_tied_embeddings() -> None:
    problem = Problem(6, 17, TopK(k=17))
    tokens = torch.arange(6)
    embedded = F.embedding(tokens, problem.weight)
    sums = fused_ce_kd(embedded, problem.weight, problem.labels, problem.targets, kd_ratio=0.0, chunk_size=4)
    want = F.cross_entropy(
        F.embedding(tokens, problem.weight) @ problem.weight.T, problem.labels, reduction="sum"
    )
    got_grad, want_grad = (torch.autograd.grad(loss, problem.weight)[0] for loss in (sums.loss, want))
    torch.testing.assert_close(got_grad, want_grad)


def test_teacher_entropy_completes_the_soft_cross_entropy() -> None:
    problem = Problem(6, 17, Threshold(tau=1e-6))
    sums = problem.fused(kd_ratio=0.5, temperature=2.0)
    p = (problem.teacher / 2).double().softmax(-1)
    soft = -(p * (problem.hidden @ problem.weight.T / 2).log_softmax(-1)).sum()
    assert float(sums.kd / 4 + sums.teacher_entropy) == pytest.approx(float(soft.detach()), rel=1e-3)


def test_bucket_is_a_lower_bound() -> None:
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        problem = Problem(9, 30, TopK(k=4))
        kd = problem.fused(kd_ratio=1.0, divergence=Divergence(kind)).kd
        logits = (problem.hidden @ problem.weight.T).detach()
        dense = sum(
            reference.dense_kd(z, t.double(), 1.0, kind) for z, t in zip(logits, problem.teacher, strict=True)
        )
        assert 0 <= float(kd) <= float(dense)


def check_refused(match: str, error: type[Exception] = RecipeError, **changes: object) -> None:
    problem = Problem(4, 17, THRESHOLD)
    arguments = {"labels_N": problem.labels, "targets": problem.targets, "kd_ratio": 0.5} | changes
    with pytest.raises(error, match=match):
        fused_ce_kd(problem.hidden, problem.weight, **arguments)


def test_settings_that_are_refused() -> None:
    targets: SparseTargets = Problem(4, 17, TopK(k=2)).targets
    check_refused("kd_ratio is 1.5", kd_ratio=1.5)
    check_refused("chunk_size is 0", chunk_size=0)
    check_refused("there are no targets", targets=None)
    check_refused("temperature 3 was not captured", CacheMismatchError, temperature=3.0)
    check_refused("temperature is 0", temperature=0.0)
    check_refused("softcap is 0", softcap=0.0)
    check_refused("num_vocab_ids is 18; the head has 17 ids", num_vocab_ids=18)
    check_refused("serve only", divergence=Divergence("reverse_kl"))
    check_refused("tail 'gost'", tail="gost", targets=targets)
    check_refused("positions", ValueError, labels_N=torch.zeros(3, dtype=torch.int64))
    check_refused("label 17 is outside", ValueError, labels_N=torch.tensor([0, 1, 2, 17]))
    check_refused("label -1 is outside", ValueError, labels_N=torch.tensor([0, 1, 2, -1]))
    check_refused("outside the 3 ids", ValueError, num_vocab_ids=3)
    check_refused("divergence is 'reverse_kl'; give a Divergence", divergence="reverse_kl")
    check_refused(r"labels \[2, 2\]; give the positions", ValueError, labels_N=torch.zeros(2, 2).long())
    check_refused("labels are torch.float32", ValueError, labels_N=torch.zeros(4))
    check_refused("live teacher's logits to KDLoss", ValueError, targets=torch.zeros(4, 17))
    for name in ("weights_N", "kd_factors_N", "kd_ratio"):
        learned = torch.full((4,), 0.5, requires_grad=True)
        check_refused(rf"{name} asks for a gradient.* give {name}.detach\(\)", ValueError, **{name: learned})
    with pytest.raises(RecipeError, match="unknown; choose one of"):
        Divergence("kl")
    with pytest.raises(RecipeError, match="between 0 and 1"):
        Divergence("jensen_shannon", 1.0)


@pytest.mark.parametrize("policy", [THRESHOLD, Random(draws=8), TopK(k=3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [4, 512])
def test_each_position_may_have_its_own_ratio(policy: Policy, temperature: float, chunk_size: int) -> None:
    """None of CE, none of KD, and between; of ignored positions it does not matter."""
    problem = Problem(7, 11, policy)
    problem.labels[3] = IGNORED
    ratios = torch.tensor([1.0, 0.0, 0.25, 0.5, 1.0, 0.5, 0.75])
    options = {"kd_ratio": ratios, "temperature": temperature}
    sums = problem.fused(**options, weights_N=problem.weights, chunk_size=chunk_size)
    assert_close(sums, problem, problem.expected(**options, weights=True))


def test_ratios_of_ignored_positions_mean_nothing_and_need_not_be_dense() -> None:
    """Kernels read what lies one after the other."""
    problem = Problem(4, 5, THRESHOLD)
    problem.labels[1] = IGNORED
    two = torch.stack([torch.tensor([0.5, torch.nan, 1.0, 0.25]), torch.zeros(4)], dim=1)
    want = problem.fused(kd_ratio=torch.tensor([0.5, 0.5, 1.0, 0.25]))
    assert torch.equal(problem.fused(kd_ratio=two[:, 0]).loss, want.loss)
    given = {"kd_ratios_N": two[:, 0], "kd_factors_N": two[:, 1]}
    positions = counted_positions(problem.hidden, problem.labels * 0, None, problem.targets, IGNORED, **given)
    assert positions.kd_ratios_N is not None
    assert positions.kd_factors_N is not None
    assert positions.kd_ratios_N.is_contiguous()
    assert positions.kd_factors_N.is_contiguous()
    one = problem.fused(kd_ratio=torch.tensor(0.5))
    torch.testing.assert_close(one.loss, problem.fused(kd_ratio=0.5).loss)


def test_ratios_of_positions_lie_between_none_and_all_and_need_targets() -> None:
    problem = Problem(2, 5, THRESHOLD)
    with pytest.raises(RecipeError, match=r"kd_ratio is 1\.5; it must lie between 0"):
        problem.fused(kd_ratio=torch.tensor([0.5, 1.5]))
    for shape in ((3,), (2, 1)):
        with pytest.raises(ValueError, match=r"kd_ratio has the shape .*, and there are 2 positions"):
            problem.fused(kd_ratio=torch.ones(shape))
    problem.targets = None  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="but there are no targets"):
        problem.fused(kd_ratio=torch.ones(2))
    assert float(problem.fused(kd_ratio=torch.zeros(2)).kd) == 0.0


@pytest.mark.parametrize("policy", [THRESHOLD, TopK(k=3), Random(draws=4)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_add_up_to_the_sums(policy: Policy, temperature: float) -> None:
    problem = Problem(11, 13, policy)
    problem.labels[[0, 7]] = IGNORED
    options = {"temperature": temperature, "chunk_size": 4, "bias_V": problem.bias, "softcap": 3.0}
    sums = problem.fused(kd_ratio=0.3, **options)
    each = ce_kd_by_position(problem.hidden, problem.weight, problem.labels, problem.targets, **options)
    for found, wanted in zip(each.sums(problem.labels, kd_ratio=0.3), sums, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)
    assert not each.ce_N.requires_grad
    assert each.ce_N[[0, 7]].tolist() == [0, 0]
    alone = [
        fused_ce_kd(
            problem.hidden[n : n + 1],
            problem.weight,
            problem.labels[n : n + 1],
            problem.targets.select(torch.tensor([n])),
            kd_ratio=0.3,
            **options,
        ).kd.item()
        for n in range(11)
    ]
    torch.testing.assert_close(each.kd_N, torch.tensor(alone, dtype=torch.float64))


def test_positions_without_a_weight_are_zero_and_stay_in_their_places() -> None:
    problem = Problem(5, 13, THRESHOLD)
    problem.labels[1] = IGNORED
    every = ce_kd_by_position(problem.hidden, problem.weight, problem.labels, problem.targets)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0])
    some = ce_kd_by_position(
        problem.hidden, problem.weight, problem.labels, problem.targets, weights_N=weights
    )
    for found, whole in zip(some, every, strict=True):
        torch.testing.assert_close(found, torch.where(weights != 0, whole, 0))


def test_a_weight_of_nan_is_seen_at_its_position() -> None:
    """On a GPU it stands for a wrong id (``positions.with_checked_ids``)."""
    problem = Problem(5, 13, THRESHOLD)
    weights = torch.tensor([1.0, torch.nan, 0.0, 0.5, 1.0])
    each = ce_kd_by_position(
        problem.hidden, problem.weight, problem.labels, problem.targets, weights_N=weights
    )
    for found in each:
        assert found.isnan().tolist() == [False, True, False, False, False]


def test_positions_without_targets_have_no_kd() -> None:
    problem = Problem(3, 5, THRESHOLD)
    each = ce_kd_by_position(problem.hidden, problem.weight, problem.labels)
    assert each.kd_N.tolist() == [0, 0, 0]
    assert (each.ce_N > 0).all()


class Kernel:
    """Stands for the kernel's module, where its first launch ends so."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def chunk_loss_(self, *arguments: object, **options: object) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def installed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(chunk, "importlib", SimpleNamespace(util=found, import_module=lambda name: kernel))
    chunk._kernel.cache_clear()
    try:
        yield
    finally:
        chunk._kernel.cache_clear()


def chosen(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> object:
    with installed(kernel, monkeypatch):
        return chunk._kernel(torch.device("cpu"))


def test_without_a_compiler_pytorch_makes_the_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = Kernel(None)
    assert chosen(works, monkeypatch) is works
    assert not caplog.records
    broken = Kernel(RuntimeError("Failed to find C compiler. Please specify via CC\nor else"))
    assert chosen(broken, monkeypatch) is None
    assert "cannot be used on this machine (RuntimeError: Failed to find C compiler" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_a_full_gpu_is_no_missing_compiler(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised is not kept: the next launch may find room."""
    with pytest.raises(type(error)):
        chosen(Kernel(error), monkeypatch)


def test_the_kernel_is_launched_on_the_device_of_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which may be another one.  The tensors have a device and no memory."""
    current = [torch.device("cuda", 0)]
    launched = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Launched(Kernel):
        def chunk_loss_(self, *arguments: object, **options: object) -> None:
            launched.append(current[-1])

    monkeypatch.setattr("torch.cuda.device", on)
    options = LossSettings(kd_ratio=0.0, temperature=1.0, num_vocab_ids=16)
    with installed(Launched(None), monkeypatch), FakeTensorMode():
        logits, labels = torch.zeros(2, 16, device="cuda:1"), torch.zeros(2, device="cuda:1").long()
        chunk.chunk_loss_(logits, labels, None, None, 0, options, with_grad=True)
    assert launched == [torch.device("cuda", 1)] * 2  # the first one asks whether it works
