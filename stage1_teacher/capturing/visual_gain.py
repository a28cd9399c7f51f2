"""The teacher's second pass, without what the pictures show: how much they matter at each token of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shared.capture.targets import label_gain, label_losses
from shared.data.collation import Batch, Encoded
from shared.errors import DataError, listed
from stage1_teacher.capturing.teacher import Teacher


def visual_gain(
    teacher: Teacher,
    collate: Callable[[Sequence[Encoded]], Batch],
    encoded: Sequence[Encoded],
    ce_N: Tensor,
    *,
    chunk_size: int,
    names: Sequence[str],
) -> Tensor:
    """By how much the pictures raise the log-prob of each label, (N,) fp32 nats; 0 for examples without pictures.

    collate  examples as the teacher is fed them
    ce_N     (N,) of the first pass
    Raises   DataError  with the names of the examples for which the teacher gives NaN or infinity
    """
    shown = [one for one in encoded if one.unseen is not None]
    if not shown:
        return torch.zeros_like(ce_N)
    batch = collate([one.unseen for one in shown if one.unseen is not None])
    with torch.inference_mode():
        hidden_nD = teacher.hidden(batch)
        losses_n = label_losses(hidden_nD, batch.labels, logprobs=teacher.logprobs, chunk_size=chunk_size)
        gain_N = label_gain(encoded, ce_N, losses_n)
    if not bool(gain_N.isfinite().all()):
        parts = gain_N.split([one.num_positions for one in encoded])
        odd = [name for name, part_n in zip(names, parts, strict=True) if not bool(part_n.isfinite().all())]
        raise DataError(
            f"the teacher: what it gives for {len(odd)} row(s) without their pictures is no distribution:\n"
            f"{listed(odd)}\nAnother teacher.dtype may help (float32), or take these rows out"
        )
    return gain_N
