"""KD from logits: the loss with the interface that KD recipes know.

    loss = KDLoss(temperature=2.0, chunk_size=512)(student_logits, teacher_logits, labels)

With a ``chunk_size`` the gradient is made in the forward pass, that many positions at a time: what is kept
for the backward pass is the logits' gradient, once.  Without one it is plain autograd, which keeps the
log-probabilities of both models in fp32.  The trainer uses ``fused_ce_kd``, which needs no logits at all.

M positions of a batch, N that count, C of a chunk, V vocabulary (of all ranks, or of this rank's part).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RecipeError
from shared.kd_loss.chunk import chunk_loss_, rows_per_tile
from shared.kd_loss.divergences import FORWARD_KL, Divergence, check_divergence
from shared.kd_loss.gradients import scaled
from shared.kd_loss.positions import with_checked_entries
from shared.kd_loss.teacher import check_tail, sparse_teacher
from shared.kd_loss.tile import LossSettings, check_num_vocab_ids, check_temperature, num_local_ids
from shared.kd_loss.vocab_parallel import VocabShard, local_part
from shared.recipes.policies import DEFAULT_TAIL

if TYPE_CHECKING:
    from shared.sparse import Targets

# Overwrites the logits of some positions with the gradient of their KD, and returns the KD (C,).
ChunkKd = Callable[[Tensor, int], Tensor]


class KDLoss(nn.Module):
    """Distils a teacher: the mean over valid positions of KL(teacher || student), times T squared.

    ignore_index  label of positions that do not count
    temperature   T of both distributions; targets must have captured it
    fp32_upcast   False: a dense teacher's softmax and gradient are in the logits' dtype, which saves memory and
                  digits; sparse teachers, and sums over ids and positions, are fp32 or wider whatever it says
    tp_group      ranks that split the vocabulary; inferred where the student's logits are a DTensor
    chunk_size    positions at a time; 0 for all at once, with plain autograd for dense teachers on one rank
    divergence, tail  as for ``fused_ce_kd``
    num_vocab_ids  the first ids of the logits, which the teacher knows; None for all: padding ids of a wide head
                   have no mass, also where a dense teacher's logits say otherwise; a live teacher's head may then
                   have another width, but for a vocabulary split

    Holds    value and gradient do not depend on the chunk size but for rounding; two ranks equal one
             a batch without labels gives a zero with a graph
             gradients are finite for logits of -inf, and for ids whose mass underflows, in one model or both;
             reverse KL excepted where the teacher alone excludes an id: it is infinite there
             with a chunk size and a dense teacher, the graph keeps the logits' gradient and nothing else of
             their size
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: dist.ProcessGroup | None = None,
        chunk_size: int = 0,
        *,
        divergence: Divergence = FORWARD_KL,
        tail: str = DEFAULT_TAIL,
        num_vocab_ids: int | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_divergence(divergence)
        check_tail(tail)
        if chunk_size < 0:
            raise RecipeError(f"chunk_size is {chunk_size}; it must be 0 (all at once) or more")
        self.ignore_index, self.temperature, self.fp32_upcast = ignore_index, temperature, fp32_upcast
        self.tp_group, self.chunk_size, self.divergence, self.tail = tp_group, chunk_size, divergence, tail
        self.num_vocab_ids = num_vocab_ids

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | Targets,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Shapes   student_logits (..., V); labels (...) int64; teacher (..., V) logits, with ``num_vocab_ids`` of
                 these or more, or SparseTargets of the valid positions in their order
                 under a vocabulary split: this rank's part of both logits, or a whole teacher
        Returns  () fp32 (fp64 for fp64 logits), nats: the mean over valid positions, or their sum over
                 ``num_batch_labels``, which may be a tensor (); no labels at all count as one
        """
        student_MV, group = local_part(student_logits, -1, self.tp_group)
        student_MV, labels_M = student_MV.reshape(-1, student_MV.shape[-1]), labels.reshape(-1)
        if len(labels_M) != len(student_MV):
            raise ValueError(f"logits {tuple(student_logits.shape)} do not fit labels {tuple(labels.shape)}")
        shard = None if group is None else VocabShard.agree(group, student_MV.shape[1], labels_M)
        index_N = (labels_M != self.ignore_index).nonzero().squeeze(1)
        num_ids = student_MV.shape[1] if shard is None else shard.total_ids
        num_vocab_ids = num_ids if self.num_vocab_ids is None else self.num_vocab_ids
        check_num_vocab_ids(num_vocab_ids, num_ids, of="logits have")
        settings = LossSettings(1.0, self.temperature, num_vocab_ids, None, self.divergence, shard)
        if isinstance(teacher, Tensor):
            kd = self._from_logits(student_MV, teacher, index_N, settings)
        else:
            kd = self._from_targets(student_MV, teacher, index_N, settings)
        num_labels = len(index_N) if num_batch_labels is None else num_batch_labels
        return kd / (num_labels.clamp_min(1) if isinstance(num_labels, Tensor) else max(1, num_labels))

    def _from_logits(
        self, student_MV: Tensor, teacher: Tensor, index_N: Tensor, settings: LossSettings
    ) -> Tensor:
        num_ids = student_MV.shape[1] if settings.shard is None else settings.shard.total_ids
        if settings.divergence.kind == "reverse_kl" and settings.num_vocab_ids < num_ids:
            raise RecipeError(
                f"divergence reverse_kl with num_vocab_ids {settings.num_vocab_ids} of {num_ids}: it is infinite, as "
                "the student's softmax has the padding ids, where the teacher has no mass. Give the first "
                f"{settings.num_vocab_ids} logits of both without num_vocab_ids, or choose another divergence"
            )
        teacher_MV = _teacher_part(teacher, student_MV, settings.shard, self.num_vocab_ids)
        if self.chunk_size == 0 and settings.shard is None:
            return self._unchunked(student_MV, teacher_MV, index_N, settings)

        def chunk_kd(logits_CV: Tensor, start: int) -> Tensor:
            teacher_CV = teacher_MV[index_N[start : start + len(logits_CV)]]
            tile = rows_per_tile(logits_CV, self._dtype(logits_CV), settings.shard)
            tiles = zip(logits_CV.split(tile), teacher_CV.split(tile), strict=True)
            return torch.cat(
                [self._tile_kd_(student_RV, teacher_RV, settings) for student_RV, teacher_RV in tiles]
            )

        return _ChunkedKd.apply(student_MV, index_N, self.chunk_size, chunk_kd, torch.is_grad_enabled())

    def _unchunked(
        self, student_MV: Tensor, teacher_MV: Tensor, index_N: Tensor, settings: LossSettings
    ) -> Tensor:
        if len(index_N) < len(student_MV):
            student_MV, teacher_MV = student_MV[index_N], teacher_MV[index_N]
        dtype = self._dtype(student_MV)
        logp_NV = torch.log_softmax(_softened_teacher(teacher_MV, dtype, settings), -1)
        logq_NV = torch.log_softmax(student_MV.to(dtype) / self.temperature, -1)
        terms_NV, _ = self.divergence.terms(logp_NV, logq_NV)
        kd_N = terms_NV.sum(-1, dtype=_sum_dtype(student_MV))
        return kd_N.sum(dtype=torch.float64).to(kd_N.dtype) * self.temperature**2

    def _tile_kd_(self, student_RV: Tensor, teacher_RV: Tensor, settings: LossSettings) -> Tensor:
        """KD of a few rows, whose student logits become its gradient by them."""
        dtype, temperature, shard = self._dtype(student_RV), self.temperature, settings.shard
        logp_RV = _log_softmax(_softened_teacher(teacher_RV, dtype, settings), shard)
        logq_RV = _log_softmax(student_RV.to(dtype) / temperature, shard)
        terms_RV, slopes_RV = self.divergence.terms(logp_RV, logq_RV)
        wide = _sum_dtype(student_RV)
        sums_2R = torch.stack([terms_RV.sum(-1, dtype=wide), slopes_RV.sum(-1, dtype=wide)])
        kd_R, slope_sum_R = sums_2R if shard is None else shard.sum(sums_2R)
        gradient_RV = slopes_RV.addcmul_(logq_RV.exp_(), slope_sum_R[:, None].to(dtype), value=-1)
        student_RV.copy_(gradient_RV.mul_(temperature))
        return kd_R * temperature**2

    def _from_targets(
        self, student_MV: Tensor, targets: Targets, index_N: Tensor, settings: LossSettings
    ) -> Tensor:
        if targets.num_positions != len(index_N):
            raise ValueError(
                f"the targets have {targets.num_positions} positions, the labels {len(index_N)} valid ones"
            )
        targets, factor = with_checked_entries(targets, settings.num_vocab_ids)
        teacher = sparse_teacher(
            targets,
            temperature=self.temperature,
            divergence=self.divergence,
            tail=self.tail,
            num_vocab_ids=settings.num_vocab_ids,
            dtype=_sum_dtype(student_MV),
        )

        def chunk_kd(logits_CV: Tensor, start: int) -> Tensor:
            labels_C = torch.zeros_like(index_N[: len(logits_CV)])  # any: CE has no part in the loss
            _, kd_C = chunk_loss_(logits_CV, labels_C, None, teacher, start, settings, with_grad=True)
            return kd_C

        kd = _ChunkedKd.apply(student_MV, index_N, self.chunk_size, chunk_kd, torch.is_grad_enabled())
        return kd * factor

    def _dtype(self, logits: Tensor) -> torch.dtype:
        return _sum_dtype(logits) if self.fp32_upcast else logits.dtype


def _sum_dtype(logits: Tensor) -> torch.dtype:
    """Of sums over ids and of what is returned: never narrower than fp32."""
    return torch.promote_types(logits.dtype, torch.float32)


def _teacher_part(
    teacher: Tensor, student_MV: Tensor, shard: VocabShard | None, num_vocab_ids: int | None
) -> Tensor:
    """The teacher's logits of this rank's ids, one row for each of the student's; padding ids have any."""
    teacher, _ = local_part(teacher, -1, None)
    teacher_MV = teacher.reshape(-1, teacher.shape[-1])
    if shard is not None and teacher_MV.shape[1] == shard.total_ids:
        teacher_MV = teacher_MV[:, shard.start : shard.start + shard.num_ids]
    if shard is None and num_vocab_ids is not None and teacher_MV.shape[1] >= num_vocab_ids:
        width = student_MV.shape[1]
        teacher_MV = teacher_MV[:, :width]
        if teacher_MV.shape[1] < width:
            teacher_MV = F.pad(teacher_MV, (0, width - teacher_MV.shape[1]))
    if teacher_MV.shape != student_MV.shape:
        raise ValueError(
            f"teacher logits {tuple(teacher.shape)} do not fit the student's {tuple(student_MV.shape)}"
        )
    return teacher_MV


def _softened_teacher(teacher_RV: Tensor, dtype: torch.dtype, settings: LossSettings) -> Tensor:
    """A copy of its logits over the temperature, -inf at the ids that it does not know."""
    softened_RV = teacher_RV.detach().to(dtype) / settings.temperature
    softened_RV[:, num_local_ids(settings) :] = -torch.inf
    return softened_RV


def _log_softmax(logits_RV: Tensor, shard: VocabShard | None) -> Tensor:
    """Over the vocabulary of all ranks."""
    if shard is None:
        return torch.log_softmax(logits_RV, -1)
    shifted_RV = logits_RV - shard.max(logits_RV.amax(-1))[:, None]
    return shifted_RV - shard.sum(shifted_RV.exp().sum(-1)).log()[:, None]


class _ChunkedKd(torch.autograd.Function):
    """The sum of KD over positions, a chunk at a time; keeps the logits' gradient and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, student_MV: Tensor, index_N: Tensor, chunk_size: int, chunk_kd: ChunkKd, with_grad: bool
    ) -> Tensor:
        step = chunk_size or max(1, len(index_N))
        grad_MV = None
        if with_grad and ctx.needs_input_grad[0]:  # rows contiguous, which the logits need not be
            grad_MV = torch.zeros_like(student_MV, memory_format=torch.contiguous_format)
        kd = torch.zeros((), dtype=torch.float64, device=student_MV.device)
        for start in range(0, len(index_N), step):
            index_C = index_N[start : start + step]
            logits_CV = student_MV[index_C]
            kd += chunk_kd(logits_CV, start).sum(dtype=torch.float64)
            if grad_MV is not None:
                grad_MV.index_copy_(0, index_C, logits_CV)
        ctx.save_for_backward(grad_MV)
        return kd.to(_sum_dtype(student_MV))

    @staticmethod
    def backward(ctx: Any, grad_kd: Tensor) -> Any:
        (grad_MV,) = ctx.saved_tensors
        return (
            *scaled([grad_MV], [None if grad_MV is None else grad_MV.dtype], grad_kd),
            None,
            None,
            None,
            None,
        )
