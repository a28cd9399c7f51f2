"""How unsure a student is at each position: its entropy, from hidden states and head, a chunk at a time.

C positions of a chunk, R rows of a tile, N positions, D hidden, V vocabulary of the head, or of this rank's part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shared.kd_loss.chunk import rows_per_tile
from shared.kd_loss.vocab_parallel import VocabShard, local_part

MAX_LOGITS = 2**26  # of a tile: 256 MiB as fp32, three times
LOWEST = -1e4  # relative to a row's largest logit: exp is 0, and 0 times it is 0


@torch.no_grad()
def student_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_size: int,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The entropy of the head's softmax at temperature 1, (N,) fp32 nats (fp64 for fp64 hidden states).

    Arguments as of ``fused_ce_kd``; labels only tell whether the ranks of a split vocabulary have the same positions.

    Holds    one product with the head, and no more than a chunk's logits; the same on all ranks of a split vocabulary
    """
    weight_VD, group = local_part(weight_VD, 0, tp_group)
    if bias_V is not None:
        bias_V, _ = local_part(bias_V, 0, None)
    shard = None if group is None else VocabShard.agree(group, weight_VD.shape[0], labels_N)
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    entropy_N = hidden_ND.new_zeros(len(hidden_ND), dtype=dtype)
    num_ids = weight_VD.shape[0] if shard is None else shard.total_ids  # on all ranks the same
    buffer_CV = hidden_ND.new_empty(min(chunk_size, len(hidden_ND)), weight_VD.shape[0])
    tile = min(rows_per_tile(buffer_CV, dtype, shard), max(1, MAX_LOGITS // num_ids))
    scratch_RV = torch.empty_like(buffer_CV[:tile], dtype=dtype)
    for start in range(0, len(hidden_ND), chunk_size):
        hidden_CD = hidden_ND[start : start + chunk_size]
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: len(hidden_CD)])
        if bias_V is not None:
            logits_CV += bias_V
        for first in range(0, len(logits_CV), tile):
            logits_RV = logits_CV[first : first + tile].to(dtype)
            rows = slice(start + first, start + first + len(logits_RV))
            entropy_N[rows] = _entropy_(logits_RV, scratch_RV[: len(logits_RV)], softcap, shard)
    return same_on_all(entropy_N, None if shard is None else shard.group)


def _entropy_(
    logits_RV: Tensor, scratch_RV: Tensor, softcap: float | None, shard: VocabShard | None
) -> Tensor:
    """(R,): log sum exp(z) less the mean of z, both relative to the largest; the logits are consumed."""
    if softcap is not None:
        logits_RV.div_(softcap).tanh_().mul_(softcap)
    largest_R = logits_RV.amax(-1)
    if shard is not None:
        shard.max(largest_R)
    gaps_RV = logits_RV.sub_(largest_R[:, None]).clamp_(min=LOWEST)
    exp_RV = torch.exp(gaps_RV, out=scratch_RV)
    sums_2R = torch.stack([exp_RV.sum(-1), exp_RV.mul_(gaps_RV).sum(-1)])
    if shard is not None:
        shard.sum(sums_2R)
    sum_R, weighed_R = sums_2R
    return sum_R.log() - weighed_R / sum_R


def same_on_all(scores_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Those of the group's first rank: what is chosen by them must be the same on all, to the last bit."""
    if group is not None:
        dist.broadcast(scores_N, group=group, group_src=0)
    return scores_N
