"""``KDLoss`` against the slow reference: dense and sparse teachers, chunks, what is kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from shared.errors import RecipeError
from shared.kd_loss import DIVERGENCES, Divergence, KDLoss, fused_ce_kd
from shared.recipes.policies import Threshold, TopK
from shared.sparse import SparseTargets, position_seeds, sparsify
from tests import reference_losses as reference

IGNORED = -100


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def labels(*shape: int, every: int = 3) -> Tensor:
    """Every third one is ignored."""
    ids = torch.zeros(shape, dtype=torch.int64)
    ids.view(-1)[::every] = IGNORED
    return ids


def expected(
    student: Tensor, teacher: Tensor, ids: Tensor, temperature: float, kind: str
) -> tuple[Tensor, Tensor]:
    """The sum over valid positions, and its gradient."""
    leaf = student.detach().double().requires_grad_()
    rows = zip(leaf.flatten(0, -2), teacher.double().flatten(0, -2), ids.flatten().tolist(), strict=True)
    total = leaf.sum() * 0
    for z, t, label in rows:
        if label != IGNORED:
            total = total + reference.dense_kd(z, t, temperature, kind, 0.3)
    return total.detach(), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("chunk_size", [0, 1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_dense_teacher(kind: str, temperature: float, chunk_size: int) -> None:
    student, teacher, ids = logits(2, 5, 17).requires_grad_(), logits(2, 5, 17, seed=1), labels(2, 5)
    loss = KDLoss(temperature=temperature, chunk_size=chunk_size, divergence=Divergence(kind, 0.3))
    want, want_grad = expected(student, teacher, ids, temperature, kind)
    got = loss(student, teacher, ids, num_batch_labels=7)
    torch.testing.assert_close(got, want / 7)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], want_grad / 7)
    torch.testing.assert_close(loss(student, teacher, ids, num_batch_labels=torch.tensor(7)), want / 7)
    torch.testing.assert_close(loss(student, teacher, ids), want / 6)


@pytest.mark.parametrize(("num_positions", "num_ids"), [(1, 1), (1, 17), (3, 2), (2, 248_320)])
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_awkward_shapes(num_positions: int, num_ids: int, chunk_size: int) -> None:
    student, teacher = logits(num_positions, num_ids).requires_grad_(), logits(num_positions, num_ids, seed=1)
    ids = torch.zeros(num_positions, dtype=torch.int64)
    want, want_grad = expected(student, teacher, ids, 2.0, "forward_kl")
    got = KDLoss(temperature=2.0, chunk_size=chunk_size)(student, teacher, ids, num_batch_labels=1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], want_grad)


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("fp32_upcast", [True, False])
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_dtypes(dtype: torch.dtype, tol: float, fp32_upcast: bool, chunk_size: int) -> None:
    student, teacher = logits(12, 40, dtype=dtype).requires_grad_(), logits(12, 40, seed=1, dtype=dtype)
    want, want_grad = expected(student, teacher, labels(12), 1.0, "forward_kl")
    got = KDLoss(chunk_size=chunk_size, fp32_upcast=fp32_upcast)(student, teacher, labels(12), 1)
    (grad,) = torch.autograd.grad(got, student)
    assert abs(float(got.detach()) - float(want)) < tol * float(want)
    assert (grad.double() - want_grad).norm() < tol * want_grad.norm()
    assert grad.dtype == dtype


@pytest.mark.parametrize("chunk_size", [0, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["ghost", "uniform", "renormalize", "drop"])
def test_truncated_teacher(tail: str, temperature: float, chunk_size: int) -> None:
    student, ids = logits(9, 17).requires_grad_(), labels(9)
    targets = sparse(logits(9, 17, seed=1)[ids != IGNORED], TopK(k=4))
    got = KDLoss(temperature=temperature, chunk_size=chunk_size, tail=tail)(student, targets, ids)
    leaf = student.detach().requires_grad_()
    masses = targets.weights(temperature)
    want = sum(
        reference.truncated_kd(
            leaf[position], targets.ids[4 * n : 4 * n + 4], masses[4 * n : 4 * n + 4], temperature, tail
        )
        for n, position in enumerate((ids != IGNORED).nonzero().flatten().tolist())
    )
    torch.testing.assert_close(got, want.detach() / 6, rtol=1e-6, atol=1e-7)
    got_grad, want_grad = torch.autograd.grad(got, student)[0], torch.autograd.grad(want / 6, leaf)[0]
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-6, atol=1e-7)


def sparse(teacher_logits: Tensor, policy: Threshold | TopK) -> SparseTargets:
    seeds = position_seeds(0, b"key", len(teacher_logits))
    return sparsify(teacher_logits.float().log_softmax(-1), policy, temperatures=(1.0, 2.0), seeds=seeds)


def test_sampled_teacher_that_keeps_everything_is_the_dense_one() -> None:
    student, teacher, ids = logits(9, 17).requires_grad_(), logits(9, 17, seed=1), labels(9)
    targets = sparse(teacher[ids != IGNORED], Threshold(tau=1e-6))
    for temperature in (1.0, 2.0):
        loss = KDLoss(temperature=temperature, chunk_size=4)
        dense, kept = loss(student, teacher, ids), loss(student, targets, ids)
        torch.testing.assert_close(kept, dense, rtol=2e-3, atol=2e-3)
        grads = [torch.autograd.grad(value, student)[0] for value in (dense, kept)]
        torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(kind: str, chunk_size: int) -> None:
    teacher, ids = logits(5, 7, seed=1), labels(5)
    loss = KDLoss(temperature=1.5, chunk_size=chunk_size, divergence=Divergence(kind))
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, ids), (logits(5, 7).requires_grad_(),))


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_zero_for_equal_logits(kind: str, chunk_size: int) -> None:
    student = logits(6, 17).requires_grad_()
    got = KDLoss(chunk_size=chunk_size, divergence=Divergence(kind))(student, student.detach(), labels(6))
    assert abs(float(got.detach())) < 1e-12
    assert float(torch.autograd.grad(got, student)[0].abs().max()) < 1e-12


def test_temperature_squared_in_value_and_gradient() -> None:
    """L_T(z) = T**2 L_1(z / T): the gradient by z keeps one factor of T."""
    student, teacher, ids = logits(6, 17).requires_grad_(), logits(6, 17, seed=1), labels(6)
    for chunk_size in (0, 4):
        soft = KDLoss(temperature=4.0, chunk_size=chunk_size)(student, teacher, ids)
        scaled = (student / 4).detach().requires_grad_()
        plain = KDLoss(chunk_size=chunk_size)(scaled, teacher / 4, ids)
        torch.testing.assert_close(soft.detach(), 16 * plain.detach())
        soft_grad, plain_grad = torch.autograd.grad(soft, student)[0], torch.autograd.grad(plain, scaled)[0]
        torch.testing.assert_close(soft_grad, 4 * plain_grad)


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("num_batch_labels", [None, 0, torch.tensor(0), 7])
def test_no_labels_give_a_zero_with_a_graph(
    chunk_size: int, is_sparse: bool, num_batch_labels: int | Tensor | None
) -> None:
    student, teacher = logits(4, 17).requires_grad_(), logits(4, 17, seed=1)
    ids = torch.full((4,), IGNORED)
    targets = sparse(teacher[:0], TopK(k=2)) if is_sparse else teacher
    got = KDLoss(chunk_size=chunk_size)(student, targets, ids, num_batch_labels)
    assert float(got.detach()) == 0
    assert float(torch.autograd.grad(got, student)[0].abs().sum()) == 0


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_masked_logits(chunk_size: int) -> None:
    """Ids that both models exclude with minus infinity, as padding ids of a head."""
    student, teacher, ids = logits(6, 17), logits(6, 17, seed=1), labels(6)
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, 12:] = masked_teacher[:, 12:] = -torch.inf
    masked_student.requires_grad_()
    got = KDLoss(chunk_size=chunk_size)(masked_student, masked_teacher, ids)
    want = KDLoss()(student[:, :12], teacher[:, :12], ids)
    torch.testing.assert_close(got.detach(), want)
    assert bool(torch.autograd.grad(got, masked_student)[0].isfinite().all())


FAR = -120.0  # nats below the top: more than the exponent of fp32 holds


def far_logits(case: str) -> tuple[Tensor, Tensor]:
    """Student and teacher, fp32, some of whose ids have no mass that fp32 could hold."""
    student, teacher = (logits(6, 17, seed=seed, dtype=torch.float32) for seed in (0, 1))
    if case == "far below in both":
        student[:, 12:15], teacher[:, 13:] = FAR, FAR
    elif case == "masked in the student":
        student[:, 12:] = -torch.inf
    elif case == "masked in the teacher":
        teacher[:, 12:] = -torch.inf
    else:
        assert case == "masked in both"
        student[:, 12:] = teacher[:, 12:] = -torch.inf
    return student, teacher


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize(
    "case", ["far below in both", "masked in the student", "masked in the teacher", "masked in both"]
)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_ids_without_mass(kind: str, case: str, chunk_size: int) -> None:
    """As in fp64, which holds these masses; KL is infinite where the second one alone excludes an id."""
    student, teacher = far_logits(case)
    want, want_grad = expected(student.clamp_min(-600), teacher.clamp_min(-600), labels(6), 1.0, kind)
    if (kind, case) in {("forward_kl", "masked in the student"), ("reverse_kl", "masked in the teacher")}:
        want = torch.full_like(want, torch.inf)
    student.requires_grad_()
    got = KDLoss(chunk_size=chunk_size, divergence=Divergence(kind, 0.3))(student, teacher, labels(6), 1)
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-6)
    if (kind, case) != ("reverse_kl", "masked in the teacher"):
        (got_grad,) = torch.autograd.grad(got, student)
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_narrow_softmax_of_small_masses(kind: str, chunk_size: int) -> None:
    """Masses that fp16 just holds, whose mixture it would not."""
    student, teacher = (logits(6, 17, seed=seed, dtype=torch.float16) for seed in (0, 1))
    student[:, 12:] = teacher[:, 12:] = -12.0
    student.requires_grad_()
    want, want_grad = expected(student, teacher, labels(6), 1.0, kind)
    loss = KDLoss(chunk_size=chunk_size, divergence=Divergence(kind, 0.3), fp32_upcast=False)
    got = loss(student, teacher, labels(6), 1)
    assert abs(float(got.detach()) - float(want)) < 2e-2 * float(want)
    (got_grad,) = torch.autograd.grad(got, student)
    assert (got_grad.double() - want_grad).norm() < 2e-2 * want_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [0, 512])
def test_sums_are_fp32_at_least(chunk_size: int, dtype: torch.dtype) -> None:
    """Of so many positions that their KD is more than fp16 holds."""
    student, teacher = (4 * logits(4000, 17, seed=seed, dtype=dtype) for seed in (0, 1))
    student.requires_grad_()
    ids = torch.zeros(4000, dtype=torch.int64)
    want, _ = expected(student, teacher, ids, 2.0, "forward_kl")
    assert float(want) > torch.finfo(torch.float16).max
    for fp32_upcast in (True, False):
        loss = KDLoss(temperature=2.0, chunk_size=chunk_size, fp32_upcast=fp32_upcast)
        got = loss(student, teacher, ids, 1)
        assert got.dtype == torch.float32
        assert abs(float(got.detach()) - float(want)) < 1e-2 * float(want)


def kept_bytes(chunk_size: int) -> int:
    """Memory of what the graph holds on to."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    student, teacher = (
        logits(64, 50, dtype=torch.float32).requires_grad_(),
        logits(64, 50, dtype=torch.float32),
    )
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        KDLoss(chunk_size=chunk_size)(student, teacher, torch.zeros(64, dtype=torch.int64))
    return sum(storages.values())


def test_chunk_bounds_what_is_kept() -> None:
    logits_bytes = 64 * 50 * 4
    assert kept_bytes(8) == kept_bytes(1) == logits_bytes
    assert kept_bytes(0) >= 2 * logits_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("layout", ["columns first", "batch of columns first", "every other id"])
def test_logits_may_lie_in_any_order(layout: str, is_sparse: bool, dtype: torch.dtype) -> None:
    student, teacher, ids = logits(6, 17, dtype=dtype), logits(6, 17, seed=1), labels(6)
    other = sparse(teacher[ids != IGNORED], TopK(k=4)) if is_sparse else teacher
    leaf, strided = student.clone().requires_grad_(), student.t().contiguous().requires_grad_()
    if layout == "columns first":
        view = strided.t()
    elif layout == "batch of columns first":
        view, ids = strided[None].transpose(1, 2), ids[None]
    else:
        strided = student.repeat_interleave(2, 1).requires_grad_()
        view = strided[:, ::2]
    loss = KDLoss(chunk_size=4)
    (want,) = torch.autograd.grad(loss(leaf, other, ids.flatten()), leaf)
    (got,) = torch.autograd.grad(loss(view, other, ids), view)
    assert torch.equal(got.reshape(6, 17), want)


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("tail", ["ghost", "uniform", "renormalize", "drop"])
def test_padding_ids_get_no_mass(tail: str, chunk_size: int) -> None:
    """As of ``fused_ce_kd`` with a head that is wider than its tokenizer."""
    student, teacher = logits(9, 17).requires_grad_(), logits(9, 12, seed=1)
    ids = torch.zeros(9, dtype=torch.int64)
    targets, head = sparse(teacher, TopK(k=4)), torch.eye(17, dtype=torch.float64)
    wanted = fused_ce_kd(student, head, ids, targets, kd_ratio=1.0, tail=tail, num_vocab_ids=12).loss / 9
    got = KDLoss(chunk_size=chunk_size, tail=tail, num_vocab_ids=12)(student, targets, ids)
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_padding_ids_of_a_dense_teacher_get_no_mass(chunk_size: int) -> None:
    student, teacher, ids = logits(9, 17).requires_grad_(), logits(9, 17, seed=1), labels(9)
    masked = teacher.clone()
    masked[:, 12:] = -torch.inf
    want, got = (
        KDLoss()(student, masked, ids),
        KDLoss(chunk_size=chunk_size, num_vocab_ids=12)(student, teacher, ids),
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)))


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("num_teacher_ids", [12, 15, 20])
def test_a_teachers_head_may_have_another_width(num_teacher_ids: int, chunk_size: int) -> None:
    student, teacher, ids = logits(9, 17).requires_grad_(), logits(9, 20, seed=1), labels(9)
    loss = KDLoss(chunk_size=chunk_size, num_vocab_ids=12)
    want, got = loss(student, teacher[:, :17], ids), loss(student, teacher[:, :num_teacher_ids], ids)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(one, student)[0] for one in (got, want)))
    narrow = KDLoss(chunk_size=chunk_size, num_vocab_ids=12)(student[:, :12], teacher, ids)
    torch.testing.assert_close(narrow, KDLoss()(student[:, :12], teacher[:, :12], ids))


def test_second_order_terms_are_refused_not_dropped() -> None:
    student, teacher, ids = logits(6, 17).requires_grad_(), logits(6, 17, seed=1), labels(6)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(KDLoss(chunk_size=4)(student, teacher, ids), student, create_graph=True)
    (grad,) = torch.autograd.grad(KDLoss()(student, teacher, ids), student, create_graph=True)
    assert grad.requires_grad


def test_autograd_may_ask_twice() -> None:
    student, teacher, ids = logits(6, 17).requires_grad_(), logits(6, 17, seed=1), labels(6)
    loss = KDLoss(chunk_size=4)(student, teacher, ids)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, student)[0], 2 * first)


def test_scaling_a_bf16_gradient_does_not_bias_it() -> None:
    """A factor of 1/3 is off by 2**-9 in bf16, which rounding each element does not repeat."""
    student, teacher = logits(50, 40, dtype=torch.bfloat16).requires_grad_(), logits(50, 40, seed=1)
    loss = KDLoss(chunk_size=8)(student, teacher, torch.zeros(50, dtype=torch.int64), 1)
    whole = torch.autograd.grad(loss, student, retain_graph=True)[0].double()
    third = torch.autograd.grad(loss / 3, student)[0].double()
    assert abs(float((third * whole).sum() / (whole * whole).sum()) * 3 - 1) < 5e-4


def test_shapes_and_settings_that_are_refused() -> None:
    student, teacher = logits(4, 17), logits(4, 17)
    with pytest.raises(ValueError, match="do not fit labels"):
        KDLoss()(student, teacher, labels(5))
    with pytest.raises(ValueError, match="do not fit the student"):
        KDLoss()(student, teacher[:, :5], labels(4))
    with pytest.raises(ValueError, match="the targets have 4 positions, the labels 2"):
        KDLoss()(student, sparse(teacher, TopK(k=2)), labels(4))
    with pytest.raises(ValueError, match="outside the 3 ids"):
        KDLoss()(student[:, :3], sparse(teacher, TopK(k=17)), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RecipeError, match="temperature is 0"):
        KDLoss(temperature=0.0)
    with pytest.raises(RecipeError, match="num_vocab_ids is 18; the logits have 17 ids"):
        KDLoss(num_vocab_ids=18)(student, teacher, labels(4))
    with pytest.raises(ValueError, match="outside the 12 ids"):
        KDLoss(num_vocab_ids=12)(student, sparse(teacher, TopK(k=17)), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RecipeError, match="chunk_size is -1"):
        KDLoss(chunk_size=-1)
    with pytest.raises(RecipeError, match="divergence is 'reverse_kl'; give a Divergence"):
        KDLoss(divergence="reverse_kl")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="tail 'gost': unknown"):
        KDLoss(tail="gost")
    with pytest.raises(RecipeError, match="reverse_kl with num_vocab_ids 12 of 17: it is infinite"):
        KDLoss(num_vocab_ids=12, divergence=Divergence("reverse_kl"))(student, teacher, labels(4))
    with pytest.raises(ValueError, match="do not fit the student"):
        KDLoss(num_vocab_ids=12)(student, teacher[:, :11], labels(4))
