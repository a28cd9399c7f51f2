"""The work on a chunk's logits as one Triton kernel: normaliser, CE, KD, gradient in place.

One program takes one row: a pass over the row for the normalisers, a look at label and entries, a pass that
writes the gradient over the logits, and the entries' own gradients on top.  Entries are written last and whole, in
fp32 from the logits they had before, so that a bf16 row rounds each element once.

At Qwen's vocabulary a row takes half a megabyte, and a GPU has hundreds of rows in hand, more than its L2 cache
holds: count on three passes over memory, two to read and one to write.  They go 16 bytes at a time where the rows'
stride and their width in memory are multiples of 16 elements (``chunk.logits_buffer``).

The loss is that of ``tile.py``.  A teacher with a bucket has a kernel of its own (``triton_bucket``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kd_loss.triton_bucket import bucket_loss_
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


def chunk_loss_(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    teacher: SparseTeacher | None,
    first: int,
    settings: LossSettings,
    *,
    with_grad: bool,
    row_width: int | None = None,
    label_logprobs_C: Tensor | None = None,
    kd_ratios_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``chunk.chunk_loss_``; never makes the host wait."""
    num_rows, num_ids = logits_CV.shape
    ce_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    kd_C = torch.zeros_like(ce_C)
    if num_rows == 0:
        return ce_C, kd_C
    row_width = num_ids if row_width is None else row_width
    if teacher is not None and teacher.rows.rest_N is not None:
        return bucket_loss_(
            *(logits_CV, labels_C, weights_C, teacher, first, settings),
            with_grad=with_grad,
            row_width=row_width,
            label_logprobs_C=label_logprobs_C,
            kd_ratios_C=kd_ratios_C,
        )
    rows = None if teacher is None else teacher.rows
    unused = ce_C  # stands for tensors that the kernel does not touch
    _chunk_kernel[(num_rows,)](
        logits_CV,
        labels_C,
        unused if weights_C is None else weights_C,
        unused if label_logprobs_C is None else label_logprobs_C,
        unused if kd_ratios_C is None else kd_ratios_C,
        unused if teacher is None else teacher.offsets,
        unused if rows is None else rows.ids_E,
        unused if rows is None else rows.mass_E,
        unused if rows is None else torch.empty_like(rows.mass_E),
        unused if rows is None else rows.total_N,
        unused if rows is None else rows.constant_N,
        unused if rows is None or rows.spread_N is None else rows.spread_N,
        ce_C,
        kd_C,
        first,
        num_ids,
        row_width,
        settings.num_vocab_ids,
        logits_CV.stride(0),
        float(settings.kd_ratio),
        float(settings.temperature),
        1.0 if settings.softcap is None else float(settings.softcap),
        float(settings.reverse_kl),
        HAS_WEIGHTS=weights_C is not None,
        HAS_DRAWN=label_logprobs_C is not None,
        HAS_RATIOS=kd_ratios_C is not None,
        HAS_TEACHER=rows is not None,
        HAS_SPREAD=rows is not None and rows.spread_N is not None,
        HAS_SOFTCAP=settings.softcap is not None,
        IS_SOFTENED=settings.temperature != 1.0,
        WITH_GRAD=with_grad,
        BLOCK=block_size(num_ids),
        ENTRY_BLOCK=ENTRY_BLOCK,
        num_warps=NUM_WARPS,
    )
    return ce_C, kd_C


@triton.jit(**ANY_START)
def _chunk_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    weights_ptr,
    label_logprobs_ptr,
    kd_ratios_ptr,
    offsets_ptr,
    ids_ptr,
    mass_ptr,
    entry_logits_ptr,
    total_ptr,
    constant_ptr,
    spread_ptr,
    ce_ptr,
    kd_ptr,
    first,
    num_ids,
    row_width,
    num_vocab_ids,
    row_stride,
    kd_ratio,
    temperature,
    softcap,
    reverse_kl,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    HAS_RATIOS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SOFTENED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)

    # Pass 1: the normalisers at temperature 1 and T, relative to a running maximum.
    largest = -float("inf")
    normalizer, soft_normalizer, logit_sum = 0.0, 0.0, 0.0
    for start in range(0, num_ids, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < row_width, other=-float("inf"))
        logits = capped(logits, softcap, HAS_SOFTCAP)
        logits = tl.where(columns < num_ids, logits, -float("inf"))
        block_largest = tl.maximum(largest, tl.max(logits, 0))
        origin = tl.where(block_largest == -float("inf"), 0.0, block_largest)
        normalizer = normalizer * tl.exp(largest - origin) + tl.sum(tl.exp(logits - origin), 0)
        if IS_SOFTENED:
            rescale = tl.exp((largest - origin) / temperature)
            added = tl.sum(tl.exp((logits - origin) / temperature), 0)
            soft_normalizer = soft_normalizer * rescale + added
        if HAS_SPREAD:
            logit_sum += tl.sum(tl.where(columns < num_vocab_ids, logits, 0.0), 0)
        largest = block_largest
    # Relative to the largest logit: differences of large numbers keep their digits.
    log_sum = tl.log(normalizer)
    soft_log_sum = log_sum
    if IS_SOFTENED:
        soft_log_sum = tl.log(soft_normalizer)

    # Label and entries, as they are before the gradient is written over them.
    label_logit = capped(tl.load(logits_ptr + label), softcap, HAS_SOFTCAP)
    tl.store(ce_ptr + row, (largest - label_logit) + log_sum)
    label_logprob, kd_scale = 0.0, 0.0
    if HAS_RATIOS:
        kd_ratio = tl.load(kd_ratios_ptr + row)
    if HAS_DRAWN:
        label_logprob = tl.load(label_logprobs_ptr + row)
    log_ratio = (label_logit - largest) - log_sum - label_logprob
    ce_scale = share_of_ce(log_ratio, label_logprob, kd_ratio, reverse_kl, HAS_DRAWN)
    if HAS_WEIGHTS:
        ce_scale *= tl.load(weights_ptr + row)
    first_entry, last_entry, total, spread = 0, 0, 0.0, 0.0
    if HAS_TEACHER:
        position = first + row
        first_entry, last_entry = tl.load(offsets_ptr + position), tl.load(offsets_ptr + position + 1)
        total = tl.load(total_ptr + position)
        kd_scale = kd_ratio * temperature
        if HAS_WEIGHTS:
            kd_scale *= tl.load(weights_ptr + row)
        if HAS_SPREAD:
            spread = tl.load(spread_ptr + position)
        value = tl.load(constant_ptr + position)
        for start in range(first_entry, last_entry, ENTRY_BLOCK):
            entries = start + tl.arange(0, ENTRY_BLOCK)
            mask = entries < last_entry
            ids = tl.load(ids_ptr + entries, mask=mask, other=0)
            mass = tl.load(mass_ptr + entries, mask=mask, other=0.0)
            raw = tl.load(logits_ptr + ids, mask=mask, other=0.0).to(tl.float32)
            tl.store(entry_logits_ptr + entries, raw, mask=mask)
            gap = (largest - capped(raw, softcap, HAS_SOFTCAP)) / temperature + soft_log_sum
            value += tl.sum(tl.where(mask & (mass != 0), mass * gap, 0.0), 0)
        if HAS_SPREAD:
            gaps = (num_vocab_ids * largest - logit_sum) / temperature + num_vocab_ids * soft_log_sum
            value += tl.where(spread > 0, spread * gaps, 0.0)
        tl.store(kd_ptr + row, value * temperature * temperature)

    if WITH_GRAD:
        tl.debug_barrier()  # all threads have read what others are about to overwrite

        # Pass 2: the gradient, with the entries' mass still missing.
        for start in range(0, num_ids, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < row_width
            raw = tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            gradient = _gradient(
                raw, columns == label, largest, log_sum, soft_log_sum, ce_scale, kd_scale, total, temperature,
                softcap, tl.where(columns < num_vocab_ids, spread, 0.0), HAS_TEACHER, IS_SOFTENED, HAS_SOFTCAP,
            )  # fmt: skip
            tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)

        if HAS_TEACHER:
            tl.debug_barrier()  # entries come last
            for start in range(first_entry, last_entry, ENTRY_BLOCK):
                entries = start + tl.arange(0, ENTRY_BLOCK)
                mask = entries < last_entry
                ids = tl.load(ids_ptr + entries, mask=mask, other=0)
                mass = tl.load(mass_ptr + entries, mask=mask, other=0.0)
                raw = tl.load(entry_logits_ptr + entries, mask=mask, other=0.0)
                gradient = _gradient(
                    raw, ids == label, largest, log_sum, soft_log_sum, ce_scale, kd_scale, total, temperature,
                    softcap, mass + spread, HAS_TEACHER, IS_SOFTENED, HAS_SOFTCAP,
                )  # fmt: skip
                tl.store(logits_ptr + ids, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    raw, is_label, largest, log_sum, soft_log_sum, ce_scale, kd_scale, total, temperature, softcap, teacher_mass,
    HAS_TEACHER: tl.constexpr, IS_SOFTENED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of CE and KD by capped logits, carried on to the logits before the cap."""
    gap = capped(raw, softcap, HAS_SOFTCAP) - largest
    softmax = tl.exp(gap - log_sum)
    gradient = ce_scale * (softmax - tl.where(is_label, 1.0, 0.0))
    if HAS_TEACHER:
        if IS_SOFTENED:
            softmax = tl.exp(gap / temperature - soft_log_sum)
        gradient += kd_scale * (total * softmax - teacher_mass)
    return by_raw(gradient, raw, softcap, HAS_SOFTCAP)
