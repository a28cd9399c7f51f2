"""From a teacher's outputs to rows of the cache, for every loop that runs one.

Legend: N answer positions of some examples, n of one example or chunk, D hidden size, V ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.cache import Row
from shared.codec import encode_many
from shared.errors import DataError
from shared.recipes.policies import Policy
from shared.sparse import SparseTargets, sparsify

LOWEST_FP16 = -65504.0


class AnsweredExample(Protocol):
    """What a cache must know of an example; ``shared.data.processing.Encoded`` is one.

    Shapes   key 16 bytes; answer_ids (n,) integers: the token to be predicted at each position
    """

    @property
    def key(self) -> bytes: ...

    @property
    def answer_ids(self) -> Tensor: ...

    @property
    def truncated(self) -> bool: ...


class Unseen(Protocol):
    """An example that may have a copy without what its pictures show; ``data.collation.Encoded`` is one."""

    @property
    def answer_ids(self) -> Tensor: ...

    @property
    def unseen(self) -> object | None: ...


def sparse_targets(
    outputs_ND: Tensor,
    labels_N: Tensor,
    seeds_N: Tensor,
    *,
    logprobs: Callable[[Tensor], Tensor],
    policy: Policy,
    temperatures: Sequence[float],
    chunk_size: int,
) -> tuple[SparseTargets, Tensor]:
    """What the policy keeps of N positions, and the teacher's cross-entropy there, on the outputs' device.

    logprobs   (n, D) -> (n, V) fp32: natural log-probs at temperature 1; called for ``chunk_size`` positions
               at a time
    Shapes     outputs_ND (N, D), labels_N (N,) int64, seeds_N (N,) int64; returns targets of N positions and
               (N,) fp32 nats
    """
    parts, losses = [], []
    for start in range(0, max(len(outputs_ND), 1), chunk_size):
        chunk = slice(start, start + chunk_size)
        logprobs_nV = logprobs(outputs_ND[chunk])
        losses.append(-logprobs_nV.gather(1, labels_N[chunk, None]).squeeze(1))
        parts.append(sparsify(logprobs_nV, policy, temperatures=tuple(temperatures), seeds=seeds_N[chunk]))
    return SparseTargets.concat(parts), torch.cat(losses)


def label_losses(
    outputs_ND: Tensor, labels_N: Tensor, *, logprobs: Callable[[Tensor], Tensor], chunk_size: int
) -> Tensor:
    """The cross-entropy with the labels alone, (N,) fp32 nats; arguments as of ``sparse_targets``."""
    losses = [
        -logprobs(chunk_nD).gather(1, chunk_n[:, None]).squeeze(1)
        for chunk_nD, chunk_n in zip(outputs_ND.split(chunk_size), labels_N.split(chunk_size), strict=True)
    ]
    return torch.cat([outputs_ND.new_zeros(0, dtype=torch.float32), *losses])


def label_gain(examples: Sequence[Unseen], ce_N: Tensor, unseen_ce_n: Tensor) -> Tensor:
    """By how much the pictures raise the log-prob of each label, (N,) fp32 nats; 0 for examples without pictures.

    Shapes   ce_N (N,) of the examples as they are; unseen_ce_n (n,) of those that have ``unseen``, so fed
    """
    is_shown_N = torch.cat(
        [torch.full((len(one.answer_ids),), one.unseen is not None) for one in examples]
    ).to(ce_N.device)
    return torch.zeros_like(ce_N).index_put((is_shown_N,), unseen_ce_n - ce_N[is_shown_N])


def rows_of(
    examples: Sequence[AnsweredExample], targets: SparseTargets, ce_N: Tensor, gain_N: Tensor | None = None
) -> list[Row]:
    """The cache's row of each example, with the log-probs of its labels, which not every cache keeps.

    Shapes   targets, ce_N (N,) and gain_N (N,), on the CPU: the examples' positions one after the other
    Raises   DataError  when the teacher gives no probability to a label
    """
    offsets = [0, *np.cumsum([len(one.answer_ids) for one in examples]).tolist()]
    payloads = encode_many(targets, offsets)
    # In fp16 a log-prob of -20 is 0.008 off at most.  Adding zero makes one zero of two.
    label_log_prob_N = (-ce_N.float()).clamp(LOWEST_FP16, 0.0).half().numpy() + np.float16(0)
    label_gain_N = None
    if gain_N is not None:
        label_gain_N = gain_N.clamp(LOWEST_FP16, -LOWEST_FP16).half().numpy() + np.float16(0)
    ce_N = ce_N.double()
    for one, (start, stop) in zip(examples, pairwise(offsets), strict=True):
        if not ce_N[start:stop].sum().float().isfinite():  # as a shard keeps it
            raise DataError(
                f"example {one.key.hex()}: the teacher gives a token of its answer no probability. Take the example "
                "out, or do not mask this token's logit"
            )
    return [
        Row(
            key=one.key,
            answer_ids=one.answer_ids.cpu().numpy().astype(np.int32),
            num_entries=int(targets.offsets[stop] - targets.offsets[start]),
            ce_sum=float(ce_N[start:stop].sum()),
            entropy_sums=targets.entropy[start:stop].double().sum(0).numpy(),
            payload=payload,
            truncated=one.truncated,
            label_log_prob=label_log_prob_N[start:stop],
            label_gain=None if label_gain_N is None else label_gain_N[start:stop],
        )
        for one, payload, (start, stop) in zip(examples, payloads, pairwise(offsets), strict=True)
    ]
