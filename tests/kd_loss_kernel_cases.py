"""Cases of the Triton kernel against the PyTorch path; ``test_kd_loss_triton`` runs them.

They run in Triton's interpreter where ``TRITON_INTERPRET`` is 1, else on the GPU.  The interpreter must be
chosen before Triton is first imported: hence a file of its own, and a process of its own.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from shared.kd_loss import FORWARD_KL, Divergence, chunk, triton_kernel
from shared.kd_loss.divergences import DIVERGENCES
from shared.kd_loss.teacher import SparseTeacher, sparse_teacher
from shared.kd_loss.tile import LossSettings
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.sparse import position_seeds, sparsify
from tests.kd_loss_tail_cases import TAILS, TEACHERS, assert_rows_agree, tail_case

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # by which the GPU is left visible
FIRST = 2  # the chunk begins at the teacher's third position


def teacher_of(
    num_rows: int,
    num_ids: int,
    policy: Policy,
    temperature: float,
    tail: str,
    divergence: Divergence = FORWARD_KL,
) -> SparseTeacher:
    generator = torch.Generator().manual_seed(num_ids)
    logits = 3 * torch.randn(FIRST + num_rows, num_ids, generator=generator)
    num_vocab_ids = num_ids - num_ids // 9
    logits[:, num_vocab_ids:] = -torch.inf
    seeds = position_seeds(0, b"key", FIRST + num_rows)
    targets = sparsify(logits.log_softmax(-1), policy, temperatures=(1.0, 2.0), seeds=seeds).to(DEVICE)
    return sparse_teacher(
        targets,
        temperature=temperature,
        divergence=divergence,
        tail=tail,
        num_vocab_ids=num_vocab_ids,
        dtype=torch.float32,
    )


def assert_kernel_agrees(
    num_rows: int,
    num_ids: int,
    dtype: torch.dtype,
    teacher: SparseTeacher | None,
    settings: LossSettings,
    *,
    with_weights: bool = True,
    with_grad: bool = True,
    padding: int = 0,
    label_logprobs: torch.Tensor | None = None,
    kd_ratios: torch.Tensor | None = None,
) -> None:
    """padding  elements after each row, which mean nothing and may hold anything"""
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(num_rows, num_ids, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(num_ids, (num_rows,), generator=generator).to(DEVICE)
    weights = torch.rand(num_rows, generator=generator).to(DEVICE) if with_weights else None
    buffer = torch.full((num_rows, num_ids + padding), torch.nan, dtype=dtype, device=DEVICE)
    got_logits, want_logits = buffer[:, :num_ids], logits.float().clone()
    got_logits.copy_(logits)
    arguments = (labels, weights, teacher, FIRST, settings)
    options = {"with_grad": with_grad, "label_logprobs_C": label_logprobs, "kd_ratios_C": kd_ratios}
    got = triton_kernel.chunk_loss_(got_logits, *arguments, row_width=num_ids + padding, **options)
    want = chunk.chunk_loss_torch_(want_logits, *arguments, **options)
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other, rtol=2e-5, atol=5e-5)
    if with_grad:
        torch.testing.assert_close(got_logits, want_logits.to(dtype), rtol=2**-7, atol=2e-6)
    elif teacher is None or teacher.rows.rest_N is None:
        assert torch.equal(got_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("num_rows", "num_ids"), [(1, 1), (1, 17), (3, 17), (2, 8192), (2, 8193), (1, 20_000)]
)
def test_shapes(num_rows: int, num_ids: int, temperature: float, dtype: torch.dtype) -> None:
    teacher = teacher_of(num_rows, num_ids, Threshold(tau=0.05), temperature, "ghost")
    assert_kernel_agrees(num_rows, num_ids, dtype, teacher, LossSettings(0.4, temperature, num_ids))


@pytest.mark.parametrize("policy", [Threshold(tau=0.05), TopK(k=3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_at_some_of_the_rows(policy: Policy, temperature: float) -> None:
    teacher = teacher_of(3, 500, policy, temperature, "uniform")
    factors = torch.tensor([1.0] * FIRST + [0.0, 5.0, 0.5], device=DEVICE)
    some = replace(teacher, rows=teacher.rows.weighed(factors))
    settings = LossSettings(0.4, temperature, 500 - 500 // 9)
    assert_kernel_agrees(3, 500, torch.float32, some, settings)


@pytest.mark.parametrize("policy", [Threshold(tau=0.05), TopK(k=3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ratios_of_rows(policy: Policy, temperature: float) -> None:
    teacher = teacher_of(3, 500, policy, temperature, "ghost")
    settings, ratios = LossSettings(0.4, temperature, 500 - 500 // 9), torch.tensor([1.0, 0.0, 0.3])
    assert_kernel_agrees(3, 500, torch.float32, teacher, settings, kd_ratios=ratios.to(DEVICE))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("num_ids", "padding"), [(3, 13), (17, 15), (8193, 15), (8191, 1)])
def test_rows_with_padding(num_ids: int, padding: int, temperature: float) -> None:
    teacher = teacher_of(3, num_ids, TopK(k=1), temperature, "uniform")
    settings = LossSettings(0.4, temperature, num_ids - num_ids // 9, softcap=5.0)
    assert_kernel_agrees(3, num_ids, torch.bfloat16, teacher, settings, padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_padding_where_pytorch_does_it(dtype: torch.dtype) -> None:
    """What the kernels do not cover, as a split vocabulary, has padded rows on a GPU, too."""
    teacher, settings = teacher_of(3, 17, TopK(k=2), 1.0, "ghost"), LossSettings(0.4, 1.0, 17)
    buffer = torch.randn(3, 32, device=DEVICE).to(dtype)
    before, arguments = (
        buffer.clone(),
        (torch.tensor([1, 2, 3], device=DEVICE), None, teacher, FIRST, settings),
    )
    whole = buffer[:, :17].clone()
    got = chunk.chunk_loss_torch_(buffer[:, :17], *arguments, with_grad=True)
    want = chunk.chunk_loss_torch_(whole, *arguments, with_grad=True)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert torch.equal(buffer[:, :17], whole)
    assert torch.equal(buffer[:, 17:], before[:, 17:])


@pytest.mark.parametrize("policy", [Random(draws=300), TopK(k=130), TopK(k=1)])
@pytest.mark.parametrize("tail", ["uniform", "renormalize", "drop"])
@pytest.mark.parametrize(
    ("softcap", "kd_ratio"), [(None, 0.4), (5.0, 0.4), (None, 0.0), (5.0, 1.0)]
)  # a ratio is a factor
def test_policies_and_settings(policy: Policy, tail: str, softcap: float | None, kd_ratio: float) -> None:
    teacher = teacher_of(2, 450, policy, 2.0, tail)
    assert_kernel_agrees(2, 450, torch.float32, teacher, LossSettings(kd_ratio, 2.0, 400, softcap))


BUCKETS = [Divergence(kind) for kind in DIVERGENCES] + [Divergence("jensen_shannon", beta=0.1)]


@pytest.mark.parametrize("divergence", BUCKETS, ids=lambda one: f"{one.kind}-{one.beta}")
@pytest.mark.parametrize(
    ("num_ids", "kept", "dtype"),
    [
        (1, 1, torch.float32),
        (17, 1, torch.bfloat16),
        (17, 15, torch.float32),
        (450, 130, torch.bfloat16),
        (8193, 64, torch.float32),
        (8193, 64, torch.bfloat16),
    ],
)
def test_buckets(num_ids: int, kept: int, dtype: torch.dtype, divergence: Divergence) -> None:
    for temperature, softcap, with_grad in ((1.0, None, True), (2.0, 5.0, True), (2.0, None, False)):
        teacher = teacher_of(2, num_ids, TopK(k=kept), temperature, "ghost", divergence)
        settings = LossSettings(0.4, temperature, num_ids - num_ids // 9, softcap, divergence)
        assert_kernel_agrees(2, num_ids, dtype, teacher, settings, padding=15, with_grad=with_grad)


@pytest.mark.parametrize("divergence", BUCKETS, ids=lambda one: f"{one.kind}-{one.beta}")
@pytest.mark.parametrize("kd_ratio", [0.0, 1.0])
def test_buckets_at_some_of_the_rows(kd_ratio: float, divergence: Divergence) -> None:
    teacher = teacher_of(3, 500, TopK(k=3), 2.0, "ghost", divergence)
    factors = torch.tensor([1.0] * FIRST + [0.0, 5.0, 0.5], device=DEVICE)
    some = replace(teacher, rows=teacher.rows.weighed(factors))
    settings = LossSettings(kd_ratio, 2.0, 500 - 500 // 9, divergence=divergence, reverse_kl=0.7)
    label_logprobs = torch.tensor([-3.0, torch.nan, -0.01], device=DEVICE)
    assert_kernel_agrees(
        3, 500, torch.float32, some, settings, with_weights=False, label_logprobs=label_logprobs
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", BUCKETS[:4], ids=lambda one: one.kind)
def test_buckets_of_excluded_ids(divergence: Divergence, softcap: float | None) -> None:
    """Ids of -inf inside and outside the bucket, and none but these in it; a cap makes numbers of them."""
    settings = LossSettings(0.5, 1.0, 5, softcap, divergence)
    infinite = -torch.inf
    logits = torch.tensor(
        [[35.0, 0.0, infinite, 1.0, 2.0], [1.0, infinite, infinite, 1.0, infinite], [infinite, 1.0, 2.0, 3.0, 4.0]],
        device=DEVICE,
    )  # fmt: skip
    labels, want = torch.tensor([1, 3, 4], device=DEVICE), logits.clone()
    case = tail_case(torch.float32, temperature=1.0, teacher="unsure", small="kept")
    teacher = sparse_teacher(
        case.targets.to(DEVICE), temperature=1.0, divergence=divergence, tail="ghost", num_vocab_ids=5,
        dtype=torch.float32,
    )  # fmt: skip
    got_values = triton_kernel.chunk_loss_(logits, labels, None, teacher, 0, settings, with_grad=True)
    want_values = chunk.chunk_loss_torch_(want, labels, None, teacher, 0, settings, with_grad=True)
    for got, value in zip(got_values, want_values, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("divergence", BUCKETS[:4], ids=lambda one: one.kind)
def test_buckets_of_masses_that_underflow(divergence: Divergence) -> None:
    case = tail_case(torch.float32, temperature=1.0, teacher="unsure", small="kept")
    case.targets.logprobs[1::2] = -120
    logits, labels, num_ids = case.logits.to(DEVICE), case.labels.to(DEVICE), case.logits.shape[1]
    settings = LossSettings(0.5, 1.0, num_ids, divergence=divergence)
    found = []
    for dtype, work in ((torch.float32, triton_kernel.chunk_loss_), (torch.float64, chunk.chunk_loss_torch_)):
        teacher = sparse_teacher(
            case.targets.to(DEVICE), temperature=1.0, divergence=divergence, tail="ghost",
            num_vocab_ids=num_ids, dtype=dtype,
        )  # fmt: skip
        grads = logits.to(dtype, copy=True)
        _, kd = work(grads, labels, None, teacher, 0, settings, with_grad=True)
        found.append((kd.double(), grads.double()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", BUCKETS[:4], ids=lambda one: one.kind)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_buckets_do_not_hide_nan(temperature: float, divergence: Divergence) -> None:
    """In all of a row, in the entries alone, and in all other ids."""
    settings = LossSettings(0.5, temperature, 6, divergence=divergence)
    logits = torch.randn(3, 6, device=DEVICE)
    logits[0] = torch.nan
    logits[1, [0, 3]] = torch.nan
    logits[2, [1, 2, 4, 5]] = torch.nan
    case = tail_case(torch.float32, temperature=temperature, teacher="unsure", small="kept")
    teacher = sparse_teacher(
        case.targets.to(DEVICE), temperature=temperature, divergence=divergence, tail="ghost", num_vocab_ids=6,
        dtype=torch.float32,
    )  # fmt: skip
    for work in (triton_kernel.chunk_loss_, chunk.chunk_loss_torch_):
        got, labels = logits.clone(), torch.tensor([0, 1, 0], device=DEVICE)
        ce, kd = work(got, labels, None, teacher, 0, settings, with_grad=True)
        assert all(bool(one.isnan().all()) for one in (ce, kd, got)), (ce, kd, got)


def test_a_large_vocabulary() -> None:
    teacher = teacher_of(1, 248_320, Threshold(tau=1 / 512), 1.0, "ghost")
    assert_kernel_agrees(1, 248_320, torch.bfloat16, teacher, LossSettings(0.5, 1.0, 248_320))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_that_the_student_drew(temperature: float, softcap: float | None) -> None:
    teacher = teacher_of(4, 450, Threshold(tau=0.05), temperature, "ghost")
    settings = LossSettings(0.4, temperature, 400, softcap, reverse_kl=0.7)
    label_logprobs = torch.tensor([-3.0, torch.nan, -0.01, -20.0], device=DEVICE)
    assert_kernel_agrees(4, 450, torch.float32, teacher, settings, label_logprobs=label_logprobs)
    assert_kernel_agrees(
        4, 450, torch.bfloat16, None, settings, label_logprobs=label_logprobs, with_weights=False
    )


@pytest.mark.parametrize("with_grad", [True, False])
def test_without_teacher_or_weights(with_grad: bool) -> None:
    settings = LossSettings(0.0, 1.0, 50)
    assert_kernel_agrees(3, 50, torch.float32, None, settings, with_weights=False, with_grad=with_grad)
    assert_kernel_agrees(0, 50, torch.float32, None, settings, with_weights=False)


def test_rows_that_begin_with_masked_logits() -> None:
    logits = torch.randn(2, 20_000, device=DEVICE)
    logits[:, :10_000] = -torch.inf
    labels, settings = torch.tensor([10_001, 19_999], device=DEVICE), LossSettings(0.0, 1.0, 20_000)
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ce, _ = triton_kernel.chunk_loss_(logits, labels, None, None, 0, settings, with_grad=True)
    torch.testing.assert_close(ce, want)
    assert bool((logits[:, :10_000] == 0).all())


@pytest.mark.parametrize(("tail", "kind"), TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_masses(tail: str, kind: str, dtype: torch.dtype) -> None:
    divergence = Divergence(kind)
    both = ((1.0, "outside"), (2.0, "kept"))
    for temperature, small in both if dtype == torch.float32 else both[:1]:
        for name in TEACHERS:
            case = tail_case(dtype, temperature=temperature, teacher=name, small=small)
            num_ids = case.logits.shape[1]
            teacher = sparse_teacher(
                case.targets.to(DEVICE),
                temperature=temperature,
                divergence=divergence,
                tail=tail,
                num_vocab_ids=num_ids,
                dtype=torch.float32,
            )
            logits, labels = case.logits.to(DEVICE).clone(), case.labels.to(DEVICE)
            settings = LossSettings(1.0, temperature, num_ids, divergence=divergence)
            _, kd = triton_kernel.chunk_loss_(logits, labels, None, teacher, 0, settings, with_grad=True)
            want_loss, want = case.expected(kd_ratio=1.0, tail=tail, kind=kind)
            assert float(kd.sum()) == pytest.approx(want_loss, rel=1e-6, abs=1e-6)
            assert_rows_agree(logits.cpu(), want, dtype, atol=1e-7)


def test_excluded_ids_and_saturated_caps() -> None:
    """Zero times infinity is nothing, and 1 - tanh**2 keeps its digits, as on the PyTorch path."""
    settings = LossSettings(0.5, 1.0, 5, softcap=5.0)
    logits = torch.tensor([[35.0, 0.0, -torch.inf, 1.0, 2.0]] * 3, device=DEVICE)
    labels, want = torch.tensor([1, 3, 4], device=DEVICE), logits.clone()
    case = tail_case(torch.float32, temperature=1.0, teacher="sure", small="kept")
    teacher = sparse_teacher(
        case.targets.to(DEVICE), temperature=1.0, divergence=FORWARD_KL, tail="drop", num_vocab_ids=5,
        dtype=torch.float32,
    )  # fmt: skip
    triton_kernel.chunk_loss_(logits, labels, None, teacher, 0, settings, with_grad=True)
    chunk.chunk_loss_torch_(want, labels, None, teacher, 0, settings, with_grad=True)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=0)
