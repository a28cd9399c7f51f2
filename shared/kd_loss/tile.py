"""CE, KD and their gradient on a few rows of logits, in plain PyTorch: the reference, and the CPU's path.

R rows of a tile, E entries, X labels and entries together, V vocabulary of the head, or of this rank's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import RecipeError
from shared.kd_loss.divergences import FORWARD_KL, Divergence
from shared.kd_loss.teacher import KdRows, TeacherRows, bucket_kd, linear_kd, row_maximum, sum_rows
from shared.kd_loss.vocab_parallel import VocabShard


@dataclass(frozen=True)
class LossSettings:
    """The constants of one loss.

    kd_ratio       of positions that have no ratio of their own
    num_vocab_ids  the teacher's mass lies on so many ids of the head, the first
    """

    kd_ratio: float
    temperature: float
    num_vocab_ids: int
    softcap: float | None = None
    divergence: Divergence = FORWARD_KL
    shard: VocabShard | None = None
    reverse_kl: float = 0.0


def check_temperature(temperature: float) -> None:
    """Raises RecipeError unless distributions can be taken at it."""
    if not 0 < temperature < math.inf:
        raise RecipeError(f"temperature is {temperature}; it must be a number above 0")


def check_num_vocab_ids(num_vocab_ids: int, num_ids: int, *, of: str) -> None:
    """Raises RecipeError unless so many ids are among the first of the head's, or of what ``of`` says."""
    if not 1 <= num_vocab_ids <= num_ids:
        raise RecipeError(f"num_vocab_ids is {num_vocab_ids}; the {of} {num_ids} ids")


def tile_loss_(
    logits_RV: Tensor,
    labels_R: Tensor,
    weights_R: Tensor | None,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    with_grad: bool,
    label_logprobs_R: Tensor | None = None,
    kd_ratios_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    slope_RV = _softcap_(logits_RV, settings.softcap, with_slope=with_grad)
    temperature, kd, normalizer = settings.temperature, None, None
    label_logits_R, logits_E, logit_sum_R = _gather(logits_RV, labels_R, teacher, settings)
    softened_RV = None
    if teacher is not None:
        softened_RV = logits_RV if temperature == 1.0 else logits_RV / temperature
        kd, normalizer = _kd_(
            softened_RV, logits_E / temperature, logit_sum_R / temperature, teacher, settings
        )
    if normalizer is None or temperature != 1.0:
        normalizer = _softmax_(logits_RV, settings.shard)
    ce_R = -normalizer.logq(label_logits_R)
    if with_grad:
        kd_ratio_R = settings.kd_ratio if kd_ratios_R is None else kd_ratios_R
        share_R = 1 - kd_ratio_R
        if label_logprobs_R is not None:
            # Reverse KL's gradient is (log q(y) - log p(y)) times that of log q(y).
            share_R = share_R - settings.reverse_kl * reverse_kl(ce_R, label_logprobs_R)
        _gradient_(logits_RV, softened_RV, labels_R, weights_R, share_R, kd_ratio_R, teacher, kd, settings)
        if slope_RV is not None:
            logits_RV.mul_(slope_RV)
    return ce_R, torch.zeros_like(ce_R) if kd is None else kd.value_N * temperature**2


def reverse_kl(ce_N: Tensor, label_logprobs_N: Tensor) -> Tensor:
    """log q(y) - log p(y) of labels y that the student drew, (N,) nats; 0 where ``label_logprobs_N`` is NaN."""
    return torch.where(label_logprobs_N.isnan(), 0, -ce_N - label_logprobs_N)


class _Normalizer(NamedTuple):
    """The log of a row's sum of exp(z), in two parts: differences of large logits keep their digits."""

    largest_R: Tensor
    log_sum_R: Tensor  # of exp(z - largest)

    def logq(self, logits_R: Tensor) -> Tensor:
        return (logits_R - self.largest_R) - self.log_sum_R

    def of_rows(self, row_E: Tensor) -> _Normalizer:
        return _Normalizer(self.largest_R[row_E], self.log_sum_R[row_E])


def _softcap_(logits_RV: Tensor, softcap: float | None, *, with_slope: bool) -> Tensor | None:
    """Cap the logits in place; the slope of the cap, to multiply their gradient with."""
    if softcap is None:
        return None
    logits_RV.div_(softcap)
    # 1 / cosh(x)**2: as one minus the square of tanh it has no digits left where tanh is nearly one.
    slope_RV = logits_RV.cosh().square_().reciprocal_() if with_slope else None
    logits_RV.tanh_().mul_(softcap)
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
        logit_sum_R = logits_RV[:, : num_local_ids(settings)].sum(-1)
    if shard is not None:
        assert isinstance(here_X, Tensor)
        # where, not a product: what stands in for an id of another rank may be -inf
        picked = shard.sum(torch.cat([torch.where(here_X, logits_X, 0), logit_sum_R]))
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


def num_local_ids(settings: LossSettings) -> int:
    """How many of this rank's ids the tokenizer knows."""
    start = 0 if settings.shard is None else settings.shard.start
    return max(0, settings.num_vocab_ids - start)


def _softmax_(logits_RV: Tensor, shard: VocabShard | None) -> _Normalizer:
    """Softmax in place; its normaliser."""
    if shard is None:
        largest_R = logits_RV.amax(-1)
        torch.softmax(logits_RV, -1, out=logits_RV)
        return _Normalizer(largest_R, -logits_RV.amax(-1).log())  # the largest is at least 1 / V
    largest_R = shard.max(logits_RV.amax(-1))
    logits_RV.sub_(largest_R[:, None]).exp_()
    sum_R = shard.sum(logits_RV.sum(-1))
    logits_RV.div_(sum_R[:, None])
    return _Normalizer(largest_R, sum_R.log())


def _softmax_of_others_(logits_RV: Tensor, teacher: TeacherRows, shard: VocabShard | None) -> _Normalizer:
    """Softmax in place over the ids without an entry, zero at the entries; its normaliser, -inf for no id.

    Its sum is that of what is left, as one minus the kept would cancel; and as it is normalised by itself,
    it does not vanish where the student gives all of these ids together less than its dtype can say.
    """
    flat_E, here_E = _flat(logits_RV, teacher.row_E, teacher.ids_E, shard)
    logits_RV.view(-1)[flat_E[here_E] if isinstance(here_E, Tensor) else flat_E] = -torch.inf
    largest_R = logits_RV.amax(-1)
    if shard is not None:
        largest_R = shard.max(largest_R)
    is_empty_R = largest_R == -torch.inf
    # A row of -inf alone has no softmax: its first id stands in, and is taken out again.
    logits_RV[:, 0].masked_fill_(is_empty_R, 0)
    normalizer = _softmax_(logits_RV, shard)
    logits_RV[:, 0].masked_fill_(is_empty_R, 0)
    return _Normalizer(normalizer.largest_R.masked_fill(is_empty_R, -torch.inf), normalizer.log_sum_R)


def _kd_(
    logits_RV: Tensor, logits_E: Tensor, logit_sum_R: Tensor, teacher: TeacherRows, settings: LossSettings
) -> tuple[KdRows, _Normalizer]:
    """KD of softened logits, which become the row that ``KdRows`` scales; their normaliser."""
    row_E = teacher.row_E
    if teacher.rest_N is None:
        normalizer = _softmax_(logits_RV, settings.shard)
        gap_R = logit_sum_R - settings.num_vocab_ids * normalizer.largest_R
        all_logq_R = gap_R - settings.num_vocab_ids * normalizer.log_sum_R
        return linear_kd(teacher, normalizer.of_rows(row_E).logq(logits_E), all_logq_R), normalizer
    others = _softmax_of_others_(logits_RV, teacher, settings.shard)
    num_rows = len(others.largest_R)
    largest_R = torch.maximum(row_maximum(logits_E, row_E, num_rows), others.largest_R)
    log_others_R = others.largest_R - largest_R + others.log_sum_R
    kept_R = sum_rows((logits_E - largest_R[row_E]).exp(), row_E, num_rows)
    normalizer = _Normalizer(largest_R, torch.logaddexp(kept_R.log(), log_others_R))
    logq_E = normalizer.of_rows(row_E).logq(logits_E)
    return bucket_kd(teacher, logq_E, log_others_R - normalizer.log_sum_R, settings.divergence), normalizer


def _gradient_(
    row_RV: Tensor,
    softened_RV: Tensor | None,
    labels_R: Tensor,
    weights_R: Tensor | None,
    share_R: Tensor | float,
    kd_ratio_R: Tensor | float,
    teacher: TeacherRows | None,
    kd: KdRows | None,
    settings: LossSettings,
) -> None:
    """Turn the rows into the gradient of share * CE + kd_ratio * KD, in place.

    At temperature 1 CE shares KD's row; where that is not the whole softmax, CE has its part at the entries.
    """
    num_rows = row_RV.shape[0]
    weights_R = row_RV.new_ones(num_rows) if weights_R is None else weights_R
    ce_R = weights_R * share_R
    row_X, ids_X = torch.arange(num_rows, device=labels_R.device), labels_R
    values_X = -ce_R
    if kd is None or teacher is None or softened_RV is None:
        row_RV.mul_(ce_R[:, None])
    else:
        kd_R = weights_R * (kd_ratio_R * settings.temperature)
        row_E, values_E = teacher.row_E, kd_R[teacher.row_E] * kd.entry_E
        if softened_RV is not row_RV:
            row_RV.mul_(ce_R[:, None]).addcmul_(softened_RV, (kd_R * kd.scale_N)[:, None])
        elif kd.student_rest_N is None or kd.student_E is None:
            row_RV.mul_((ce_R + kd_R * kd.scale_N)[:, None])
        else:
            row_RV.mul_((ce_R * kd.student_rest_N + kd_R * kd.scale_N)[:, None])
            values_E = values_E + ce_R[row_E] * kd.student_E
        if kd.constant_N is not None:
            row_RV[:, : num_local_ids(settings)].add_((kd_R * kd.constant_N)[:, None])
        row_X, ids_X = torch.cat([row_X, row_E]), torch.cat([ids_X, teacher.ids_E])
        values_X = torch.cat([values_X, values_E])
    flat_X, here_X = _flat(row_RV, row_X, ids_X, settings.shard)
    row_RV.view(-1).index_add_(0, flat_X, values_X * here_X)
