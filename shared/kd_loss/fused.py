"""From hidden states to the mixed loss, a chunk of positions at a time.

For each chunk the logits are computed, turned into their own gradient in place, and multiplied back into the
gradients of hidden states and head, all inside the forward pass.  No tensor of N x V ever exists, and memory
does not grow with N beyond the hidden states' own gradient.

    sums = fused_ce_kd(hidden_ND, head.weight, labels_N, targets, kd_ratio=0.5)
    (sums.loss / global_num_positions).backward()

N positions, C positions of a chunk, D hidden, V vocabulary of the head, E entries.
"""

# ruff: noqa: N815  (shape suffixes)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import RecipeError
from shared.kd_loss.chunk import LossSettings, chunk_loss_
from shared.kd_loss.divergences import FORWARD_KL, Divergence
from shared.kd_loss.teacher import TeacherRows, teacher_rows
from shared.kd_loss.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from shared.sparse import SparseTargets


class LossSums(NamedTuple):
    """Sums over positions, () fp32 nats; only ``loss`` carries a graph.

    loss             (1 - kd_ratio) * ce + kd_ratio * kd
    ce               cross-entropy with the labels
    kd               KL from teacher to student, times T squared; 0 where no targets were given
    teacher_entropy  of the teacher at the temperature: kd / T**2 + teacher_entropy is the soft cross-entropy
    num_positions    () int64: positions that counted: a label, and a weight that is not zero
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    teacher_entropy: Tensor
    num_positions: Tensor


def fused_ce_kd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: SparseTargets | None = None,
    *,
    kd_ratio: float,
    temperature: float = 1.0,
    chunk_size: int = 512,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    divergence: Divergence = FORWARD_KL,
    tail: str = "ghost",
    weights_N: Tensor | None = None,
    num_vocab_ids: int | None = None,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
) -> LossSums:
    """Cross-entropy and distillation of the head's logits, as sums; gradients are made in the forward pass.

    The student's softmax covers the whole head, as its CE does in Transformers.  Of the head's V ids the
    teacher knows the first ``num_vocab_ids`` (all by default): padding ids of a wide head have no mass.

    Shapes   hidden_ND (N, D), weight_VD (V, D), bias_V (V,)  fp64, fp32, bf16 or fp16
             labels_N (N,) int64, ``ignore_index`` where a position does not count
             targets of N positions; weights_N (N,) of positions, no gradient by them
             under ``tp_group`` weight_VD and bias_V are this rank's part of the vocabulary, in rank order
    Returns  LossSums; under ``tp_group`` complete on every rank, as is the hidden states' gradient
    Raises   RecipeError  for settings that contradict each other or the targets
             ValueError   for labels or entries outside the vocabulary, or other counts of positions
    Holds    independent of chunk size, order and ranks; KD zero when student equals teacher
             no positions give a zero with a graph; frozen inputs cost no gradient; ``no_grad`` no memory
             the head's gradient is accumulated in fp32
    Source   derived in docs/loss.md
    """
    settings = _settings(weight_VD, kd_ratio, temperature, num_vocab_ids, softcap, divergence, tp_group)
    _check(hidden_ND, labels_N, targets, settings, chunk_size)
    position_weights_N = (labels_N != ignore_index).to(torch.float32)
    if weights_N is not None:
        position_weights_N = position_weights_N * weights_N.detach().to(torch.float32)
    counted_N = position_weights_N != 0
    num_positions = counted_N.sum()
    labels_N = labels_N.masked_fill(labels_N == ignore_index, 0)
    if (hidden_ND.device.type == "cpu" or weights_N is not None) and not bool(counted_N.all()):
        index = counted_N.nonzero().squeeze(1)
        hidden_ND, labels_N, position_weights_N = hidden_ND[index], labels_N[index], position_weights_N[index]
        targets = None if targets is None else targets.select(index)
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    teacher = None
    if targets is not None:
        teacher = teacher_rows(
            targets,
            temperature=temperature,
            divergence=divergence,
            tail=tail,
            num_vocab_ids=settings.num_vocab_ids,
            dtype=dtype,
        )
    work = _Work(
        labels_N, position_weights_N.to(dtype), teacher, settings, chunk_size, torch.is_grad_enabled()
    )
    loss, ce, kd, entropy = _FusedLoss.apply(*_autocast(hidden_ND, weight_VD, bias_V), work)
    return LossSums(loss, ce, kd, entropy, num_positions)


@dataclass
class _Work:
    labels_N: Tensor
    weights_N: Tensor
    teacher: TeacherRows | None
    settings: LossSettings
    chunk_size: int
    with_grad: bool


def _settings(
    weight_VD: Tensor,
    kd_ratio: float,
    temperature: float,
    num_vocab_ids: int | None,
    softcap: float | None,
    divergence: Divergence,
    tp_group: dist.ProcessGroup | None,
) -> LossSettings:
    shard, num_ids = None, weight_VD.shape[0]
    if tp_group is not None:
        shard = VocabShard.of_group(tp_group, num_ids, weight_VD.device)
        num_ids = int(shard.sum(torch.tensor(num_ids, device=weight_VD.device)))
    return LossSettings(kd_ratio, temperature, num_vocab_ids or num_ids, softcap, divergence, shard)


def _check(
    hidden_ND: Tensor,
    labels_N: Tensor,
    targets: SparseTargets | None,
    settings: LossSettings,
    chunk_size: int,
) -> None:
    if not 0.0 <= settings.kd_ratio <= 1.0:
        raise RecipeError(f"kd_ratio is {settings.kd_ratio}; it must lie between 0 (CE only) and 1 (KD only)")
    if not settings.temperature > 0:
        raise RecipeError(f"temperature is {settings.temperature}; it must be above 0")
    if chunk_size < 1:
        raise RecipeError(f"chunk_size is {chunk_size}; the fused loss needs at least one position a chunk")
    if targets is None and settings.kd_ratio > 0:
        raise RecipeError(
            f"kd_ratio is {settings.kd_ratio} but there are no targets; set it to 0 or give a cache"
        )
    counts = {hidden_ND.shape[0], labels_N.shape[0]} | ({targets.num_positions} if targets else set())
    if len(counts) != 1:
        raise ValueError(
            f"hidden states, labels and targets must have the same number of positions, got "
            f"{hidden_ND.shape[0]}, {labels_N.shape[0]}, {targets.num_positions if targets else 'none'}"
        )


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of the inputs of a matrix product."""
    device_type = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


class _FusedLoss(torch.autograd.Function):
    """The loop over chunks.  Backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: _Work) -> Any:
        needs = [work.with_grad and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, grads = _forward(hidden_ND, weight_VD, bias_V, work, needs)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V)]
        loss, ce, kd, entropy = sums
        ctx.mark_non_differentiable(ce, kd, entropy)
        return loss, ce, kd, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        grads = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None)


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: _Work, needs: list[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    num_positions, num_ids = hidden_ND.shape[0], weight_VD.shape[0]
    grad_hidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[1] else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs[2] and bias_V is not None else None
    buffer_CV = hidden_ND.new_empty(min(work.chunk_size, num_positions), num_ids)
    ce_N = hidden_ND.new_zeros(num_positions, dtype=dtype)
    kd_N = torch.zeros_like(ce_N)
    for start in range(0, num_positions, work.chunk_size):
        chunk = slice(start, min(start + work.chunk_size, num_positions))
        hidden_CD, logits_CV = hidden_ND[chunk], buffer_CV[: chunk.stop - start]
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
        if bias_V is not None:
            logits_CV.add_(bias_V)
        ce_N[chunk], kd_N[chunk] = chunk_loss_(
            logits_CV,
            work.labels_N[chunk],
            work.weights_N[chunk],
            None if work.teacher is None else work.teacher.slice(chunk.start, chunk.stop),
            work.settings,
            with_grad=any(needs),
        )
        if grad_hidden_ND is not None:
            torch.mm(logits_CV, weight_VD, out=grad_hidden_ND[chunk])
        if grad_weight_VD is not None:
            grad_weight_VD.addmm_(logits_CV.to(dtype).t(), hidden_CD.to(dtype))
        if grad_bias_V is not None:
            grad_bias_V.add_(logits_CV.sum(0, dtype=dtype))
    if work.settings.shard is not None and grad_hidden_ND is not None:
        work.settings.shard.sum(grad_hidden_ND)
    return _sums(ce_N, kd_N, work), [grad_hidden_ND, grad_weight_VD, grad_bias_V]


def _sums(ce_N: Tensor, kd_N: Tensor, work: _Work) -> list[Tensor]:
    entropy_N = torch.zeros_like(ce_N) if work.teacher is None else work.teacher.entropy_N
    ce, kd, entropy = [
        (values_N * work.weights_N).sum(dtype=torch.float64).to(ce_N.dtype)
        for values_N in (ce_N, kd_N, entropy_N)
    ]
    kd_ratio = work.settings.kd_ratio
    return [(1 - kd_ratio) * ce + kd_ratio * kd, ce, kd, entropy]
