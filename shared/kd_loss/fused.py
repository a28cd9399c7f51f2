"""From hidden states to the mixed loss, a chunk of positions at a time.

For each chunk the logits are computed, turned into their own gradient in place, and multiplied back into the
gradients of hidden states and head, all inside the forward pass.  No tensor of N x V ever exists, and memory
does not grow with N beyond the hidden states' own gradient.

    sums = fused_ce_kd(hidden_ND, head.weight, labels_N, targets, kd_ratio=0.5)
    (sums.loss / global_num_positions).backward()

N positions, C positions of a chunk, D hidden, V vocabulary of the head, W its width in memory, E entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import RecipeError
from shared.kd_loss.chunk import chunk_loss_, logits_buffer
from shared.kd_loss.divergences import FORWARD_KL, Divergence, check_divergence
from shared.kd_loss.gradients import add_to_pieces_, scaled, zero_pieces
from shared.kd_loss.positions import Positions, counted, counted_positions, with_checked_ids
from shared.kd_loss.teacher import SparseTeacher, sparse_teacher
from shared.kd_loss.tile import LossSettings, check_num_vocab_ids, check_temperature
from shared.kd_loss.tile import reverse_kl as drawn_reverse_kl
from shared.kd_loss.vocab_parallel import VocabShard, local_part
from shared.recipes.policies import DEFAULT_TAIL

if TYPE_CHECKING:
    from shared.sparse import Targets


class LossSums(NamedTuple):
    """Sums over positions, () fp32 nats; only ``loss`` carries a graph.

    loss             (1 - kd_ratio) * ce + kd_ratio * kd, each position with its ratio
    ce               cross-entropy with the labels
    kd               KL from teacher to student, times T squared; 0 where no targets were given
    teacher_entropy  of the teacher at the temperature: kd / T**2 + teacher_entropy is the soft cross-entropy
    num_positions    () int64: positions that counted: a label, and a weight that is not zero
    reverse_kl       log q(y) - log p(y) of labels that the student drew: on average the KL from student to teacher
    num_drawn        () int64: positions that have such a label
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    teacher_entropy: Tensor
    num_positions: Tensor
    reverse_kl: Tensor
    num_drawn: Tensor


class PositionLosses(NamedTuple):
    """Of each position, (N,) fp32 nats (fp64 for fp64 hidden states), without a graph; 0 where one does not count.

    ce               cross-entropy with the label
    kd               KL from teacher to student, times T squared; 0 where no targets were given
    teacher_entropy  of the teacher at the temperature
    """

    ce_N: Tensor
    kd_N: Tensor
    teacher_entropy_N: Tensor

    def sums(self, labels_N: Tensor, *, kd_ratio: float, ignore_index: int = -100) -> LossSums:
        """What ``fused_ce_kd`` gives for the same positions, without a graph."""
        count = (labels_N != ignore_index).sum()
        return _sums(torch.stack(self), None, LossSettings(kd_ratio, 1.0, 1), count)


def fused_ce_kd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None = None,
    *,
    kd_ratio: float | Tensor,
    temperature: float = 1.0,
    chunk_size: int = 512,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    divergence: Divergence = FORWARD_KL,
    tail: str = DEFAULT_TAIL,
    weights_N: Tensor | None = None,
    kd_factors_N: Tensor | None = None,
    num_vocab_ids: int | None = None,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
    reverse_kl: float = 0.0,
    label_logprobs_N: Tensor | None = None,
) -> LossSums:
    """Cross-entropy and distillation of the head's logits, as sums; gradients are made in the forward pass.

    The student's softmax covers the whole head, as its CE does in Transformers.  Of the head's V ids the
    teacher knows the first ``num_vocab_ids`` (all by default): padding ids of a wide head have no mass.

    A head that is a DTensor split over its rows, or a ``tp_group``, means a vocabulary split over ranks: each
    rank brings its own rows and the same positions.  A head sharded by FSDP is whole inside the root's
    forward, which is where this loss belongs.

    ``reverse_kl`` times the KL from student to teacher is added where ``label_logprobs_N`` has the teacher's log-prob
    of the label.  Such a label must be a sample of the student; elsewhere the log-prob is NaN.

    Shapes   hidden_ND (N, D), weight_VD (V, D), bias_V (V,)  fp64, fp32, bf16 or fp16
             kd_ratio between 0 and 1, or (N,) of them
             labels_N (N,) int64, ``ignore_index`` where a position does not count
             targets of N positions; weights_N (N,) of positions: factors of all sums but those that count; in
             fp16 near one, as the gradients lose digits with smaller ones
             kd_factors_N (N,), 0 or above: further factors of ``kd`` and ``teacher_entropy``
             label_logprobs_N (N,) fp32, at temperature 1
    Returns  LossSums; of a split vocabulary complete on every rank, as is the hidden states' gradient
    Raises   RecipeError         for settings that contradict each other or the targets
             CacheMismatchError  for a temperature that was not captured
             ValueError          for labels or entries outside the vocabulary, other counts of positions, and weights,
                                 factors or ratios that ask for a gradient: none is made for them
    Holds    independent of chunk size, order and ranks; KD zero when student equals teacher
             no positions give a zero with a graph; frozen inputs cost no gradient; ``no_grad`` no memory
             the head's gradient is accumulated in fp32
    Source   derived in docs/loss.md
    """
    weight_VD, bias_V, work = _prepared(
        hidden_ND,
        weight_VD,
        labels_N,
        targets,
        kd_ratio=kd_ratio,
        temperature=temperature,
        chunk_size=chunk_size,
        bias_V=bias_V,
        softcap=softcap,
        divergence=divergence,
        tail=tail,
        weights_N=weights_N,
        kd_factors_N=kd_factors_N,
        num_vocab_ids=num_vocab_ids,
        ignore_index=ignore_index,
        tp_group=tp_group,
        reverse_kl=reverse_kl,
        label_logprobs_N=label_logprobs_N,
    )
    loss, ce, kd, entropy, *drawn = _FusedLoss.apply(work.positions.hidden_ND, weight_VD, bias_V, work)
    return LossSums(loss, ce, kd, entropy, work.positions.count, *drawn)


@torch.no_grad()
def ce_kd_by_position(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    ignore_index: int = -100,
    **settings: Any,
) -> PositionLosses:
    """What ``fused_ce_kd`` adds up, position by position and without gradients, to see where a student is off.

    weights_N  where they are zero, so are the values, and where NaN, NaN; the others are not multiplied by theirs
    settings   the other arguments of ``fused_ce_kd``, but for those of sums alone: ``kd_ratio``, ``reverse_kl``,
               ``label_logprobs_N``; it raises the same
    """
    weight_VD, bias_V, work = _prepared(
        hidden_ND,
        weight_VD,
        labels_N,
        targets,
        kd_ratio=0.0,  # of sums alone
        temperature=temperature,
        weights_N=weights_N,
        ignore_index=ignore_index,
        **settings,
    )
    is_counted_N = counted(labels_N, weights_N, ignore_index)
    values_3N = _in_one_dtype([work.positions.hidden_ND, weight_VD, bias_V], work, [False] * 3)[0][:3]
    if work.positions.weights_N is not None:  # NaN stands for a wrong id, too
        values_3N = torch.where(work.positions.weights_N.isnan(), torch.nan, values_3N)
    if values_3N.shape[1] < len(labels_N):  # what does not count was left out
        counted_3N = values_3N
        values_3N = counted_3N.new_zeros(3, len(labels_N))
        values_3N[:, is_counted_N] = counted_3N
    return PositionLosses(*torch.where(is_counted_N, values_3N, 0))


def _prepared(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    *,
    kd_ratio: float | Tensor,
    temperature: float,
    ignore_index: int,
    chunk_size: int = 512,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    divergence: Divergence = FORWARD_KL,
    tail: str = DEFAULT_TAIL,
    weights_N: Tensor | None = None,
    kd_factors_N: Tensor | None = None,
    num_vocab_ids: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reverse_kl: float = 0.0,
    label_logprobs_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, _Work]:
    """This rank's rows of the head, and the work on them, checked."""
    hidden_ND, hidden_group = local_part(hidden_ND, 0, None)
    if hidden_group is not None:
        raise RecipeError(
            "hidden states are split over ranks; a vocabulary split needs them whole on each rank"
        )
    weight_VD, group = local_part(weight_VD, 0, tp_group)
    if bias_V is not None:
        bias_V, _ = local_part(bias_V, 0, None)
    _check_inputs(
        hidden_ND, labels_N, targets, weights_N=weights_N, kd_factors_N=kd_factors_N, kd_ratio=kd_ratio
    )
    shard = None if group is None else VocabShard.agree(group, weight_VD.shape[0], labels_N)
    num_ids = weight_VD.shape[0] if shard is None else shard.total_ids
    num_vocab_ids = num_ids if num_vocab_ids is None else num_vocab_ids
    kd_ratios_N = (
        _of_positions(kd_ratio.to(labels_N.device), len(labels_N)) if isinstance(kd_ratio, Tensor) else None
    )
    positions = counted_positions(
        hidden_ND, labels_N, weights_N, targets, ignore_index, label_logprobs_N, kd_factors_N, kd_ratios_N
    )
    ratio = kd_ratio
    if isinstance(ratio, Tensor):
        ratio = _highest(positions.kd_ratios_N, may_wait=targets is None)
    settings = LossSettings(ratio, temperature, num_vocab_ids, softcap, divergence, shard, reverse_kl)
    _check(settings, chunk_size, num_ids, has_targets=targets is not None)
    if reverse_kl and label_logprobs_N is None:
        raise RecipeError(
            f"reverse_kl is {reverse_kl} but there are no log-probs of the labels; give label_logprobs_N"
        )
    positions = with_checked_ids(positions, num_ids, num_vocab_ids)
    teacher_of = _teacher_source(positions, settings, tail)
    work = _Work(positions, teacher_of, settings, chunk_size, with_grad=torch.is_grad_enabled())
    return weight_VD, bias_V, work


def _of_positions(kd_ratio: Tensor, num_positions: int) -> Tensor:
    """(N,) of one number, or of so many."""
    if kd_ratio.ndim and kd_ratio.shape != (num_positions,):
        raise ValueError(
            f"kd_ratio has the shape {list(kd_ratio.shape)}, and there are {num_positions} positions; give one "
            "number, or one for each"
        )
    return kd_ratio.expand(num_positions)


def _check_inputs(hidden_ND: Tensor, labels_N: Tensor, targets: object, **factors: object) -> None:
    if hidden_ND.ndim != 2 or labels_N.ndim != 1:
        raise ValueError(
            f"hidden states have the shape {list(hidden_ND.shape)} and labels {list(labels_N.shape)}; give the "
            "positions one after the other: (N, D) and (N,)"
        )
    if labels_N.is_floating_point():
        raise ValueError(f"labels are {labels_N.dtype}; give ids, torch.int64")
    for name, factor in factors.items():
        if isinstance(factor, Tensor) and factor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} asks for a gradient, and the loss makes those of hidden states and head alone; give "
                f"{name}.detach()"
            )
    if isinstance(targets, Tensor):
        raise ValueError("targets are a tensor; give those of a cache, or a live teacher's logits to KDLoss")


def _highest(kd_ratios_N: Tensor | None, *, may_wait: bool) -> float:
    """The highest ratio, for a check of them all, or one that is out of range.

    On a GPU, where to look would make the host wait, it is 1 unless that may be.
    """
    if kd_ratios_N is None or (kd_ratios_N.device.type != "cpu" and not may_wait):
        return 1.0
    outside = kd_ratios_N[~((kd_ratios_N >= 0) & (kd_ratios_N <= 1))]
    return float(outside[0]) if len(outside) else max(kd_ratios_N.tolist(), default=0.0)


def _check(settings: LossSettings, chunk_size: int, num_ids: int, *, has_targets: bool) -> None:
    if not 0.0 <= settings.kd_ratio <= 1.0:
        raise RecipeError(f"kd_ratio is {settings.kd_ratio}; it must lie between 0 (CE only) and 1 (KD only)")
    check_temperature(settings.temperature)
    check_divergence(settings.divergence)
    if chunk_size < 1:
        raise RecipeError(f"chunk_size is {chunk_size}; the fused loss takes at least one position at a time")
    if settings.softcap is not None and not 0 < settings.softcap < math.inf:
        raise RecipeError(f"softcap is {settings.softcap}; it must be a number above 0, or None for no cap")
    check_num_vocab_ids(settings.num_vocab_ids, num_ids, of="head has")
    if not 0 <= settings.reverse_kl < math.inf:
        raise RecipeError(f"reverse_kl is {settings.reverse_kl}; it must be a number, 0 or above")
    if settings.kd_ratio > 0 and not has_targets:
        raise RecipeError(
            f"kd_ratio is {settings.kd_ratio} but there are no targets; give some, or set it to 0"
        )


# The teacher of the positions from start to stop, as the rows of a larger one from an index on.
TeacherSource = Callable[[int, int], tuple[SparseTeacher | None, int]]


def _teacher_source(positions: Positions, settings: LossSettings, tail: str) -> TeacherSource:
    """Unpacks entries for the loss: a chunk's on a CPU, where memory counts; else all, so as not to wait."""
    targets = positions.targets
    if targets is None:
        return lambda start, stop: (None, 0)
    dtype = torch.promote_types(positions.hidden_ND.dtype, torch.float32)

    def unpack(start: int, stop: int) -> SparseTeacher:
        found = sparse_teacher(
            targets if (start, stop) == (0, targets.num_positions) else targets.slice(start, stop),
            temperature=settings.temperature,
            divergence=settings.divergence,
            tail=tail,
            num_vocab_ids=settings.num_vocab_ids,
            dtype=dtype,
        )
        if positions.kd_factors_N is None:
            return found
        factor_N = positions.kd_factors_N[start:stop].to(dtype)
        return replace(found, rows=found.rows.weighed(factor_N))

    if targets.offsets.device.type != "cpu":
        whole = unpack(0, targets.num_positions)
        return lambda start, stop: (whole, start)
    unpack(0, 0)  # refuses what it must even where no position is left
    return lambda start, stop: (unpack(start, stop), 0)


@dataclass(frozen=True)
class _Work:
    positions: Positions
    teacher_of: TeacherSource
    settings: LossSettings
    chunk_size: int
    with_grad: bool  # asked before, as autograd is off inside of a Function


class _FusedLoss(torch.autograd.Function):
    """The loop over chunks.  Backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: _Work) -> Any:
        inputs = (hidden_ND, weight_VD, bias_V)
        needs = [work.with_grad and need for need in ctx.needs_input_grad[:3]]
        values_4N, grads = _in_one_dtype(list(inputs), work, needs)
        positions = work.positions
        sums = _sums(
            *(values_4N, positions.weights_N, work.settings, positions.count),
            logprobs_N=positions.label_logprobs_N,
            kd_ratios_N=positions.kd_ratios_N,
        )
        ctx.save_for_backward(grads.hidden_ND, grads.bias_V, *grads.weight_pieces)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(*sums[1:4], *sums[5:])
        return sums[:4] + sums[5:]  # the number of positions is no output of its own

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        hidden_ND, bias_V, *pieces = ctx.saved_tensors
        return (*scaled([hidden_ND, pieces or None, bias_V], ctx.dtypes, grad_loss), None)


class _Grads(NamedTuple):
    """Of what needs one, else None or empty; that of the head as ``zero_pieces`` cut it."""

    hidden_ND: Tensor | None
    weight_pieces: list[Tensor]
    bias_V: Tensor | None


def _in_one_dtype(inputs: list[Tensor | None], work: _Work, needs: list[bool]) -> tuple[Tensor, _Grads]:
    """Casts as autocast would a matrix product, but here, so that the head's gradient stays in fp32."""
    hidden_ND, weight_VD, _ = inputs
    assert hidden_ND is not None
    assert weight_VD is not None
    device_type, dtype = hidden_ND.device.type, hidden_ND.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        cast = [None if one is None else one.to(dtype) for one in inputs]
        return _values_and_grads(cast, work, needs, weight_VD.dtype)


def _values_and_grads(
    inputs: list[Tensor | None], work: _Work, needs: list[bool], weight_dtype: torch.dtype
) -> tuple[Tensor, _Grads]:
    """(4, N) CE, KD, teacher's entropy, reverse KL of each position, without weights; gradients of what needs one.

    weight_dtype  of the head's gradient in the end; until then it is a sum in fp32, or wider
    """
    hidden_ND, weight_VD, bias_V = inputs
    assert hidden_ND is not None
    assert weight_VD is not None
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    num_positions, num_ids = hidden_ND.shape[0], weight_VD.shape[0]
    grad_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
    weight_pieces = zero_pieces(weight_VD, dtype, weight_dtype) if needs[1] else []
    grad_bias_V = torch.zeros(num_ids, dtype=dtype, device=weight_VD.device) if needs[2] else None
    buffer_CW = logits_buffer(min(work.chunk_size, num_positions), num_ids, like=hidden_ND)
    values_4N = hidden_ND.new_zeros(4, num_positions, dtype=dtype)
    logprobs_N, kd_ratios_N = work.positions.label_logprobs_N, work.positions.kd_ratios_N
    for start in range(0, num_positions, work.chunk_size):
        chunk = slice(start, min(start + work.chunk_size, num_positions))
        hidden_CD, logits_CV = hidden_ND[chunk], buffer_CW[: chunk.stop - start, :num_ids]
        weights_N = work.positions.weights_N
        if weights_N is not None:  # zero times NaN is NaN: what does not count is taken out, not only scaled
            hidden_CD = torch.where(weights_N[chunk, None] != 0, hidden_CD, 0)
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
        if bias_V is not None:
            logits_CV.add_(bias_V)
        teacher, first = work.teacher_of(chunk.start, chunk.stop)
        values_4N[0, chunk], values_4N[1, chunk] = chunk_loss_(
            logits_CV,
            work.positions.labels_N[chunk],
            None if weights_N is None else weights_N[chunk],
            teacher,
            first,
            work.settings,
            with_grad=any(needs),
            row_width=buffer_CW.shape[1],
            label_logprobs_C=logprobs_N[chunk]
            if logprobs_N is not None and work.settings.reverse_kl
            else None,
            kd_ratios_C=None if kd_ratios_N is None else kd_ratios_N[chunk],
        )
        if logprobs_N is not None:
            values_4N[3, chunk] = drawn_reverse_kl(values_4N[0, chunk], logprobs_N[chunk])
        if teacher is not None:
            values_4N[2, chunk] = teacher.rows.entropy_N[first : first + len(hidden_CD)]
        if grad_hidden_ND is not None:
            torch.mm(logits_CV, weight_VD, out=grad_hidden_ND[chunk])
        add_to_pieces_(weight_pieces, logits_CV, hidden_CD)
        if grad_bias_V is not None:
            grad_bias_V.add_(logits_CV.sum(0, dtype=dtype))
    if work.settings.shard is not None and grad_hidden_ND is not None:
        work.settings.shard.sum(grad_hidden_ND)
    return values_4N, _Grads(grad_hidden_ND, weight_pieces, grad_bias_V)


def _sums(
    values_XN: Tensor,
    weights_N: Tensor | None,
    settings: LossSettings,
    count: Tensor,
    logprobs_N: Tensor | None = None,
    kd_ratios_N: Tensor | None = None,
) -> LossSums:
    """Added up in fp64, as KL is a small difference of large sums.  Reverse KL comes last, or is not there."""
    wide_XN = values_XN.double()
    if weights_N is not None:
        wide_XN = torch.where(weights_N != 0, wide_XN * weights_N, 0)
    ce, kd, entropy, *rest = wide_XN.sum(-1)
    reverse = rest[0] if rest else torch.zeros_like(ce)
    if kd_ratios_N is None:
        loss = _times(1 - settings.kd_ratio, ce) + _times(settings.kd_ratio, kd)
    else:
        of_ce_N = torch.where(kd_ratios_N != 1, (1 - kd_ratios_N) * wide_XN[0], 0)
        loss = (of_ce_N + torch.where(kd_ratios_N != 0, kd_ratios_N * wide_XN[1], 0)).sum()
    loss = loss + _times(settings.reverse_kl, reverse)
    dtype, num_drawn = values_XN.dtype, torch.zeros_like(count)
    if logprobs_N is not None:
        counts_N = ~logprobs_N.isnan() if weights_N is None else ~logprobs_N.isnan() & (weights_N != 0)
        num_drawn = counts_N.sum()
    return LossSums(
        loss.to(dtype), ce.to(dtype), kd.to(dtype), entropy.to(dtype), count, reverse.to(dtype), num_drawn
    )


def _times(factor: float, value: Tensor) -> Tensor:
    """What has no part in the loss adds nothing to it, though it be infinite: 0 * inf is 0."""
    return factor * value if factor else torch.zeros_like(value)
