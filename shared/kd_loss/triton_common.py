"""What both Triton kernels are made of: their sizes, and the soft cap of logits."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_BLOCK = 8192
ENTRY_BLOCK = 128
NUM_WARPS = 16
# A chunk may begin at any position: nothing is compiled anew where 16 does not divide it, nor where the labels and
# weights of the chunk, one of which a program reads, do not begin at a multiple of 16 bytes.
ANY_START = {
    "do_not_specialize": ["first"],
    "do_not_specialize_on_alignment": ["labels_ptr", "weights_ptr", "label_logprobs_ptr", "kd_ratios_ptr"],
}


def block_size(num_ids: int) -> int:
    """Elements of a row that a program has in hand at once."""
    return min(MAX_BLOCK, triton.next_power_of_2(num_ids))


@triton.jit
def capped(logits, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The student's logits in fp32; tanh by way of a sigmoid, which does not overflow."""
    logits = logits.to(tl.float32)
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@triton.jit
def by_raw(gradient, raw, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A gradient by capped logits, carried on to the logits before the cap."""
    if HAS_SOFTCAP:
        twice = 2 * raw / softcap  # 1 - tanh**2 has no digits left where tanh is nearly one
        gradient *= 4 * tl.sigmoid(twice) * tl.sigmoid(-twice)
    return gradient


@triton.jit
def share_of_ce(log_ratio, label_logprob, kd_ratio, reverse_kl, HAS_DRAWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factor of CE's gradient; ``log_ratio``: log q(y) - log p(y) of a label that the student drew."""
    scale = 1 - kd_ratio
    if HAS_DRAWN:
        scale -= reverse_kl * tl.where(label_logprob == label_logprob, log_ratio, 0.0)  # NaN: not drawn
    return scale
