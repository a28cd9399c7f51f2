"""The work on a chunk's logits for a teacher with a bucket, as one Triton kernel; ``triton_kernel`` has the others.

One program takes one row.  The entries' logits are put aside, and -inf takes their place.  So the pass for the
normaliser finds the sum of all other ids, which one minus the kept would not tell exactly, and the pass that writes
the gradient need not look for entries.  Their own gradient comes last.

The arithmetic is that of ``tile.py`` and ``teacher.bucket_kd``, row by row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kd_loss.divergences import DIVERGENCES
from shared.kd_loss.triton_common import (
    ANY_START,
    ENTRY_BLOCK,
    NUM_WARPS,
    block_size,
    by_raw,
    capped,
    share_of_ce,
)

if TYPE_CHECKING:
    from shared.kd_loss.teacher import SparseTeacher
    from shared.kd_loss.tile import LossSettings

_FORWARD_KL = tl.constexpr(DIVERGENCES.index("forward_kl"))
_REVERSE_KL = tl.constexpr(DIVERGENCES.index("reverse_kl"))
_TOTAL_VARIATION = tl.constexpr(DIVERGENCES.index("total_variation"))
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min) / 4)


def bucket_loss_(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    teacher: SparseTeacher,
    first: int,
    settings: LossSettings,
    *,
    with_grad: bool,
    row_width: int,
    label_logprobs_C: Tensor | None,
    kd_ratios_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``chunk.chunk_loss_`` for a teacher with a bucket; the logits are consumed without a gradient, too."""
    num_rows, num_ids = logits_CV.shape
    ce_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    kd_C = torch.empty_like(ce_C)
    rows, unused = teacher.rows, ce_C  # which stands for tensors that the kernel does not touch
    _bucket_kernel[(num_rows,)](
        logits_CV,
        labels_C,
        unused if weights_C is None else weights_C,
        unused if label_logprobs_C is None else label_logprobs_C,
        unused if kd_ratios_C is None else kd_ratios_C,
        teacher.offsets,
        rows.ids_E,
        rows.log_mass_E,
        torch.empty_like(rows.mass_E),
        rows.rest_N,
        unused if rows.factor_N is None else rows.factor_N,
        ce_C,
        kd_C,
        first,
        num_ids,
        row_width,
        logits_CV.stride(0),
        float(settings.kd_ratio),
        float(settings.temperature),
        1.0 if settings.softcap is None else float(settings.softcap),
        float(settings.reverse_kl),
        float(settings.divergence.beta),
        HAS_WEIGHTS=weights_C is not None,
        HAS_DRAWN=label_logprobs_C is not None,
        HAS_RATIOS=kd_ratios_C is not None,
        HAS_FACTOR=rows.factor_N is not None,
        HAS_SOFTCAP=settings.softcap is not None,
        IS_SOFTENED=settings.temperature != 1.0,
        KIND=DIVERGENCES.index(settings.divergence.kind),
        WITH_GRAD=with_grad,
        BLOCK=block_size(num_ids),
        ENTRY_BLOCK=ENTRY_BLOCK,
        num_warps=NUM_WARPS,
    )
    return ce_C, kd_C


@triton.jit
def _weighted(mass, log_ratio):  # type: ignore[no-untyped-def]
    return tl.where(mass != 0, mass * log_ratio, 0.0)  # 0 * inf is 0


@triton.jit
def _terms(log_p, log_q, beta, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """``Divergence.terms``: the summands, and their derivatives by log q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == _FORWARD_KL:
        term, slope = _weighted(p, log_p - log_q), -p
    elif KIND == _REVERSE_KL:
        term = _weighted(q, log_q - log_p)
        slope = term
    elif KIND == _TOTAL_VARIATION:
        term = tl.abs(p - q) / 2
        slope = tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / 2
    else:
        one = tl.maximum(log_p, _LOWEST) + tl.log(beta)
        other = tl.where(log_q < _LOWEST, _LOWEST, log_q) + tl.log(1 - beta)  # a maximum would drop NaN
        larger = tl.where(one > other, one, other)
        log_mixture = larger + tl.log(1 + tl.exp(tl.minimum(one, other) - larger))
        slope = (1 - beta) * _weighted(q, log_q - log_mixture)
        term = beta * _weighted(p, log_p - log_mixture) + slope
    return term, slope


@triton.jit(**ANY_START)
def _bucket_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    weights_ptr,
    label_logprobs_ptr,
    kd_ratios_ptr,
    offsets_ptr,
    ids_ptr,
    log_mass_ptr,
    entry_logits_ptr,
    rest_ptr,
    factor_ptr,
    ce_ptr,
    kd_ptr,
    first,
    num_ids,
    row_width,
    row_stride,
    kd_ratio,
    temperature,
    softcap,
    reverse_kl,
    beta,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    HAS_RATIOS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SOFTENED: tl.constexpr,
    KIND: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = first + row
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    label_logit = capped(tl.load(logits_ptr + label), softcap, HAS_SOFTCAP)
    first_entry, last_entry = tl.load(offsets_ptr + position), tl.load(offsets_ptr + position + 1)

    # The entries' logits are put aside; -inf takes their place when all threads have read label and entries.
    largest = -float("inf")
    for start in range(first_entry, last_entry, ENTRY_BLOCK):
        entries = start + tl.arange(0, ENTRY_BLOCK)
        mask = entries < last_entry
        ids = tl.load(ids_ptr + entries, mask=mask, other=0)
        raw = tl.load(logits_ptr + ids, mask=mask, other=-float("inf")).to(tl.float32)
        tl.store(entry_logits_ptr + entries, raw, mask=mask)
        kept = tl.where(mask, capped(raw, softcap, HAS_SOFTCAP), -float("inf"))
        largest = tl.maximum(largest, tl.max(kept, 0))
    tl.debug_barrier()
    for start in range(first_entry, last_entry, ENTRY_BLOCK):
        entries = start + tl.arange(0, ENTRY_BLOCK)
        mask = entries < last_entry
        ids = tl.load(ids_ptr + entries, mask=mask, other=0)
        tl.store(logits_ptr + ids, -float("inf"), mask=mask)
    tl.debug_barrier()

    # Pass 1: the normalisers of all other ids at temperature 1 and T, relative to a running maximum.
    largest_other = -float("inf")
    others, soft_others, num_excluded = 0.0, 0.0, 0
    for start in range(0, num_ids, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + columns, mask=columns < row_width, other=-float("inf")).to(tl.float32)
        raw = tl.where(columns < num_ids, raw, -float("inf"))
        is_excluded = raw == -float("inf")
        if HAS_SOFTCAP:
            num_excluded += tl.sum((is_excluded & (columns < num_ids)).to(tl.int32), 0)
        logits = tl.where(is_excluded, -float("inf"), capped(raw, softcap, HAS_SOFTCAP))
        block_largest = tl.maximum(largest_other, tl.max(logits, 0))
        origin = tl.where(block_largest == -float("inf"), 0.0, block_largest)
        others = others * tl.exp(largest_other - origin) + tl.sum(tl.exp(logits - origin), 0)
        if IS_SOFTENED:
            rescale = tl.exp((largest_other - origin) / temperature)
            soft_others = soft_others * rescale + tl.sum(tl.exp((logits - origin) / temperature), 0)
        largest_other = block_largest
    if HAS_SOFTCAP:  # a logit of -inf that is no entry's is capped like any other
        num_lowest = num_excluded - (last_entry - first_entry)
        before = largest_other
        largest_other = tl.where(num_lowest > 0, tl.maximum(before, -softcap), before)
        origin = tl.where(largest_other == -float("inf"), 0.0, largest_other)
        others = others * tl.exp(before - origin) + num_lowest * tl.exp(-softcap - origin)
        rescale, lowest = tl.exp((before - origin) / temperature), tl.exp((-softcap - origin) / temperature)
        soft_others = soft_others * rescale + num_lowest * lowest
    if not IS_SOFTENED:
        soft_others = others
    has_others = others != 0  # also where they are NaN, which must not be hidden
    largest = tl.maximum(largest, largest_other)
    log_soft_others = tl.where(has_others, tl.log(soft_others), 0.0)
    log_rest = tl.where(has_others, (largest_other - largest) / temperature + log_soft_others, -float("inf"))

    # The normalisers of all ids.  Relative to the largest logit: differences of large numbers keep their digits.
    normalizer = tl.where(has_others, others * tl.exp(largest_other - largest), 0.0)
    soft_normalizer = tl.exp(log_rest)
    for start in range(first_entry, last_entry, ENTRY_BLOCK):
        entries = start + tl.arange(0, ENTRY_BLOCK)
        mask = entries < last_entry
        raw = tl.load(entry_logits_ptr + entries, mask=mask, other=0.0)
        gap = tl.where(mask, capped(raw, softcap, HAS_SOFTCAP) - largest, -float("inf"))
        normalizer += tl.sum(tl.exp(gap), 0)
        if IS_SOFTENED:
            soft_normalizer += tl.sum(tl.exp(gap / temperature), 0)
    log_sum = tl.log(normalizer)
    soft_log_sum = log_sum
    if IS_SOFTENED:
        soft_log_sum = tl.log(soft_normalizer)
    log_rest -= soft_log_sum
    rest_q = tl.exp(log_rest)

    tl.store(ce_ptr + row, (largest - label_logit) + log_sum)
    weight, label_logprob, factor = 1.0, 0.0, 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row)
    if HAS_DRAWN:
        label_logprob = tl.load(label_logprobs_ptr + row)
    if HAS_RATIOS:
        kd_ratio = tl.load(kd_ratios_ptr + row)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + position)
    log_ratio = (label_logit - largest) - log_sum - label_logprob
    ce_scale = weight * share_of_ce(log_ratio, label_logprob, kd_ratio, reverse_kl, HAS_DRAWN)
    kd_scale = weight * kd_ratio * temperature * factor

    # The divergence, and the likeliest outcome's slope in units of its mass, which is taken from all slopes.
    rest_term, rest_slope = _terms(tl.log(tl.load(rest_ptr + position)), log_rest, beta, KIND)
    value, top_q, ratio = rest_term, rest_q, tl.where(rest_q > 0, rest_slope / rest_q, -float("inf"))
    for start in range(first_entry, last_entry, ENTRY_BLOCK):
        mask, log_p, _, gap = _entries(
            start, last_entry, log_mass_ptr, entry_logits_ptr, largest, softcap, HAS_SOFTCAP, ENTRY_BLOCK
        )
        log_q = gap / temperature - soft_log_sum
        term, slope = _terms(log_p, log_q, beta, KIND)
        value += tl.sum(tl.where(mask, term, 0.0), 0)
        q = tl.where(mask, tl.exp(log_q), 0.0)
        block_top = tl.max(q, 0)
        block_ratio = tl.max(tl.where(mask & (q == block_top), slope / q, -float("inf")), 0)
        ratio = tl.where(block_top > top_q, block_ratio, ratio)
        top_q = tl.maximum(top_q, block_top)
    tl.store(kd_ptr + row, _weighted(factor, value) * temperature * temperature)

    if WITH_GRAD:
        is_rest_top = rest_q == top_q
        rest_slope = tl.where(is_rest_top, 0.0, rest_slope - ratio * rest_q)
        slope_sum = rest_slope
        for start in range(first_entry, last_entry, ENTRY_BLOCK):
            mask, log_p, _, gap = _entries(
                start, last_entry, log_mass_ptr, entry_logits_ptr, largest, softcap, HAS_SOFTCAP, ENTRY_BLOCK
            )
            log_q = gap / temperature - soft_log_sum
            slope = _slope(log_p, log_q, top_q, ratio, beta, KIND)
            slope_sum += tl.sum(tl.where(mask, slope, 0.0), 0)
        rest_scale = kd_scale * (rest_slope - rest_q * slope_sum)

        # Pass 2: the gradient of all other ids.  The entries' -inf gives zeros, which are written over.
        origin = tl.where(has_others, largest_other, 0.0)
        for start in range(0, num_ids, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < row_width
            raw = tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            logits = capped(raw, softcap, HAS_SOFTCAP)
            softmax = tl.exp(logits - largest - log_sum)
            gradient = ce_scale * (softmax - tl.where(columns == label, 1.0, 0.0))
            gradient += rest_scale * tl.exp((logits - origin) / temperature - log_soft_others)
            gradient = by_raw(gradient, raw, softcap, HAS_SOFTCAP)
            tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)

        tl.debug_barrier()  # entries come last
        for start in range(first_entry, last_entry, ENTRY_BLOCK):
            mask, log_p, raw, gap = _entries(
                start, last_entry, log_mass_ptr, entry_logits_ptr, largest, softcap, HAS_SOFTCAP, ENTRY_BLOCK
            )
            ids = tl.load(ids_ptr + start + tl.arange(0, ENTRY_BLOCK), mask=mask, other=0)
            log_q = gap / temperature - soft_log_sum
            slope = _slope(log_p, log_q, top_q, ratio, beta, KIND)
            gradient = ce_scale * (tl.exp(gap - log_sum) - tl.where(ids == label, 1.0, 0.0))
            gradient += kd_scale * (slope - tl.exp(log_q) * slope_sum)
            gradient = by_raw(gradient, raw, softcap, HAS_SOFTCAP)
            tl.store(logits_ptr + ids, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _entries(  # type: ignore[no-untyped-def]
    start, last_entry, log_mass_ptr, entry_logits_ptr, largest, softcap,
    HAS_SOFTCAP: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of a block are there, the log of the teacher's masses, logits, and these capped, less the largest."""
    entries = start + tl.arange(0, ENTRY_BLOCK)
    mask = entries < last_entry
    log_p = tl.load(log_mass_ptr + entries, mask=mask, other=0.0)
    raw = tl.load(entry_logits_ptr + entries, mask=mask, other=0.0)
    return mask, log_p, raw, capped(raw, softcap, HAS_SOFTCAP) - largest


@triton.jit
def _slope(log_p, log_q, top_q, ratio, beta, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """An entry's slope less ``ratio`` times its mass: zero for the likeliest, so that sums are of small numbers."""
    _, slope = _terms(log_p, log_q, beta, KIND)
    q = tl.exp(log_q)
    return tl.where((q == top_q) & (slope / q == ratio), 0.0, slope - ratio * q)
