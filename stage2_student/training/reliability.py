"""Calibration sums of a microbatch, on its device: what ``shared.reports.reliability`` makes a figure of.

N positions, B bins, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.models.vlm import Head
from shared.reports.reliability import NUM_BINS
from shared.sparse import MixedTargets, RegroupedTargets, SparseTargets, Targets
from shared.sparse.entropies import is_share

MAX_LOGITS = 2**24  # at once: 64 MiB as fp32


def reliability_sums(top_probs_N: Tensor, is_label_N: Tensor) -> Tensor:
    """(3, B) fp64: positions, probabilities and labels met, by bins of probability; never makes the host wait."""
    bins_N = (top_probs_N * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
    rows_3N = torch.stack([torch.ones_like(top_probs_N), top_probs_N, is_label_N]).double()
    return rows_3N.new_zeros(3, NUM_BINS).index_add_(1, bins_N, rows_3N)


def student_reliability(hidden_ND: Tensor, head: Head, labels_N: Tensor) -> Tensor:
    """(3, B) of the head's own likeliest ids at temperature 1.

    One more product with the head than the losses need, of answer positions alone, some positions at a time.
    """
    sums_3B = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=hidden_ND.device)
    num_rows = max(1, MAX_LOGITS // head.weight_VD.shape[0])
    for hidden_RD, labels_R in zip(hidden_ND.split(num_rows), labels_N.split(num_rows), strict=True):
        if len(labels_R):
            logits_RV = head.logits(hidden_RD).float()
            largest_R, ids_R = logits_RV.max(-1)
            sums_3B += reliability_sums((largest_R - logits_RV.logsumexp(-1)).exp(), ids_R == labels_R)
    return sums_3B


def tells_probabilities(targets: Targets) -> bool:
    """Whether the teacher's likeliest token, and its probability at temperature 1, are known of a position.

    Not of tokens of another vocabulary; nor of ``random`` at another temperature alone, which keeps shares of draws.
    """
    if isinstance(targets, RegroupedTargets):
        return False
    parts = targets.parts if isinstance(targets, MixedTargets) else [targets]
    return not any(is_share(one) and one.temperatures != (1.0,) for one in parts)


def teacher_reliability(targets: SparseTargets | MixedTargets, labels_N: Tensor) -> Tensor:
    """(3, B) of the likeliest ids that were kept."""
    probs_N, ids_N = targets.likeliest()
    return reliability_sums(probs_N, ids_N == labels_N)
