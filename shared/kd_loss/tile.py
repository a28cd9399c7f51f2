"""CE, KD and their gradient on a few rows of logits, in plain PyTorch: the reference, and the CPU's path.

R rows of a tile, E entries, X labels and entries together, V vocabulary of the head, or of this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kd_loss.divergences import FORWARD_KL, Divergence
from shared.kd_loss.teacher import KdRows, TeacherRows, bucket_kd, linear_kd
from shared.kd_loss.vocab_parallel import VocabShard


@dataclass(frozen=True)
class LossSettings:
    """The constants of one loss.  The teacher's mass lies on the first ``num_vocab_ids`` ids of the head."""

    kd_ratio: float
    temperature: float
    num_vocab_ids: int
    softcap: float | None = None
    divergence: Divergence = FORWARD_KL
    shard: VocabShard | None = None


def tile_loss_(
    logits_RV: Tensor,
    labels_R: Tensor,
    weights_R: Tensor | None,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    slope_RV = _softcap_(logits_RV, settings.softcap, with_slope=with_grad)
    temperature, kd = settings.temperature, None
    label_logits_R, logits_E, logit_sum_R = _gather(logits_RV, labels_R, teacher, settings)
    softened_RV = None
    if teacher is not None and temperature != 1.0:
        softened_RV = logits_RV / temperature
        logits_E, logit_sum_R = logits_E / temperature, logit_sum_R / temperature
        soft_lse_R = _softmax_(softened_RV, settings.shard)
        kd = _kd(softened_RV, soft_lse_R, logits_E, logit_sum_R, teacher, settings)
    lse_R = _softmax_(logits_RV, settings.shard)
    if teacher is not None and kd is None:
        kd = _kd(logits_RV, lse_R, logits_E, logit_sum_R, teacher, settings)
    if with_grad:
        _gradient_(logits_RV, softened_RV, labels_R, weights_R, teacher, kd, settings)
        if slope_RV is not None:
            logits_RV.mul_(slope_RV)
    ce_R = lse_R - label_logits_R
    return ce_R, torch.zeros_like(ce_R) if kd is None else kd.value_N * temperature**2


def _softcap_(logits_RV: Tensor, softcap: float | None, *, with_slope: bool) -> Tensor | None:
    """Cap the logits in place; the slope of the cap, to multiply their gradient with."""
    if softcap is None:
        return None
    logits_RV.div_(softcap).tanh_()
    slope_RV = 1 - logits_RV.square() if with_slope else None
    logits_RV.mul_(softcap)
    return slope_RV


def _gather(
    logits_RV: Tensor, labels_R: Tensor, teacher: TeacherRows | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of labels and entries, and the sum over valid ids where the teacher spreads mass there."""
    num_rows, shard = logits_RV.shape[0], settings.shard
    row_X, ids_X = torch.arange(num_rows, device=logits_RV.device), labels_R
    if teacher is not None:
        row_X, ids_X = torch.cat([row_X, teacher.row_E]), torch.cat([ids_X, teacher.ids_E])
    flat_X, here_X = _flat(logits_RV, row_X, ids_X, shard)
    logits_X = logits_RV.view(-1).index_select(0, flat_X)
    logit_sum_R = logits_X.new_zeros(num_rows)
    if teacher is not None and teacher.spread_N is not None:
        logit_sum_R = logits_RV[:, : _num_local_ids(settings)].sum(-1)
    if shard is not None:
        picked = shard.sum(torch.cat([logits_X * here_X, logit_sum_R]))
        logits_X, logit_sum_R = picked[: len(row_X)], picked[len(row_X) :]
    return logits_X[:num_rows], logits_X[num_rows:], logit_sum_R


def _flat(
    logits_RV: Tensor, row_X: Tensor, ids_X: Tensor, shard: VocabShard | None
) -> tuple[Tensor, Tensor | float]:
    """Places in the flattened tile, and a mask of those on this rank (one for all without a split)."""
    if shard is None:
        return row_X * logits_RV.shape[1] + ids_X, 1.0
    local_X, here_X = shard.local(ids_X)
    return row_X * logits_RV.shape[1] + local_X, here_X


def _num_local_ids(settings: LossSettings) -> int:
    """How many of this rank's ids the tokenizer knows."""
    start = 0 if settings.shard is None else settings.shard.start
    return max(0, settings.num_vocab_ids - start)


def _softmax_(logits_RV: Tensor, shard: VocabShard | None) -> Tensor:
    """Softmax in place; its log-normaliser per row."""
    if shard is None:
        largest_R = logits_RV.amax(-1)
        torch.softmax(logits_RV, -1, out=logits_RV)
        return largest_R - logits_RV.amax(-1).log()  # the largest probability is at least 1 / V
    largest_R = shard.max(logits_RV.amax(-1))
    logits_RV.sub_(largest_R[:, None]).exp_()
    normalizer_R = shard.sum(logits_RV.sum(-1))
    logits_RV.div_(normalizer_R[:, None])
    return largest_R + normalizer_R.log()


def _kd(
    softmax_RV: Tensor,
    lse_R: Tensor,
    logits_E: Tensor,
    logit_sum_R: Tensor,
    teacher: TeacherRows,
    settings: LossSettings,
) -> KdRows:
    if teacher.rest_N is None:
        return linear_kd(teacher, lse_R, logits_E, logit_sum_R)
    rest_R = _rest(softmax_RV, teacher, settings.shard)
    return bucket_kd(teacher, logits_E - lse_R[teacher.row_E], rest_R.log(), settings.divergence)


def _rest(softmax_RV: Tensor, teacher: TeacherRows, shard: VocabShard | None) -> Tensor:
    """The student's mass outside the entries: a sum of what is left, as one minus the kept would cancel."""
    assert teacher.rest_N is not None
    flat_E, here_E = _flat(softmax_RV, teacher.row_E, teacher.ids_E, shard)
    if isinstance(here_E, Tensor):
        flat_E = flat_E[here_E]
    flat_softmax = softmax_RV.view(-1)
    kept_E = flat_softmax[flat_E]
    flat_softmax[flat_E] = 0
    rest_R = softmax_RV.sum(-1)
    flat_softmax[flat_E] = kept_E
    rest_R = rest_R if shard is None else shard.sum(rest_R)
    floor = torch.finfo(rest_R.dtype).tiny
    return torch.where(teacher.rest_N > 0, rest_R.clamp_min(floor), rest_R)


def _gradient_(
    softmax_RV: Tensor,
    softened_RV: Tensor | None,
    labels_R: Tensor,
    weights_R: Tensor | None,
    teacher: TeacherRows | None,
    kd: KdRows | None,
    settings: LossSettings,
) -> None:
    """Turn the softmax into the gradient of (1 - kd_ratio) * CE + kd_ratio * KD, in place."""
    num_rows = softmax_RV.shape[0]
    weights_R = softmax_RV.new_ones(num_rows) if weights_R is None else weights_R
    ce_R = weights_R * (1 - settings.kd_ratio)
    kd_R = weights_R * (settings.kd_ratio * settings.temperature)
    if kd is None or softened_RV is not None:
        softmax_RV.mul_(ce_R[:, None])
    else:
        softmax_RV.mul_((ce_R + kd_R * kd.scale_N)[:, None])
    if kd is not None and softened_RV is not None:
        softmax_RV.addcmul_(softened_RV, (kd_R * kd.scale_N)[:, None])
    if kd is not None and kd.constant_N is not None:
        softmax_RV[:, : _num_local_ids(settings)].add_((kd_R * kd.constant_N)[:, None])
    row_X, ids_X = torch.arange(num_rows, device=labels_R.device), labels_R
    values_X = -ce_R
    if kd is not None and teacher is not None:
        row_X, ids_X = torch.cat([row_X, teacher.row_E]), torch.cat([ids_X, teacher.ids_E])
        values_X = torch.cat([values_X, kd_R[teacher.row_E] * kd.entry_E])
    flat_X, here_X = _flat(softmax_RV, row_X, ids_X, settings.shard)
    softmax_RV.view(-1).index_add_(0, flat_X, values_X * here_X)
