"""Which positions count: labels that are not ignored, weights that are not zero, ids inside the vocabulary.

On a CPU positions that do not count are left out before the head is applied, and ids are checked.  On a GPU
both would make the host wait, so positions are left out only where weights were given, and a wrong id turns
the loss into NaN, which training refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from shared.sparse import Targets


@dataclass(frozen=True)
class Positions:
    """N positions that the head is applied to.

    Shapes   hidden_ND (N, D); labels_N (N,) int64 inside the vocabulary; weights_N (N,) fp32, None for one
             label_logprobs_N (N,) fp32, the teacher's of the labels that the student drew, else NaN
             count () int64: how many of the positions given count
             kd_factors_N (N,) of KD alone, None for one
             kd_ratios_N (N,) fp32, each position's own; None: that of the loss
    """

    hidden_ND: Tensor
    labels_N: Tensor
    weights_N: Tensor | None
    targets: Targets | None
    count: Tensor
    label_logprobs_N: Tensor | None = None
    kd_factors_N: Tensor | None = None
    kd_ratios_N: Tensor | None = None


def counted(labels_N: Tensor, weights_N: Tensor | None, ignore_index: int) -> Tensor:
    """Which positions have a label, and a weight that is not zero in fp32: (N,) bool."""
    has_label_N = labels_N != ignore_index
    return has_label_N if weights_N is None else has_label_N & (weights_N.to(torch.float32) != 0)


def counted_positions(
    hidden_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    targets: Targets | None,
    ignore_index: int,
    label_logprobs_N: Tensor | None = None,
    kd_factors_N: Tensor | None = None,
    kd_ratios_N: Tensor | None = None,
) -> Positions:
    """The positions that count, with a graph to ``hidden_ND`` even if there are none.

    Raises   ValueError  for different numbers of positions
    Holds    what is returned is dense: kernels read it by position
    """
    counts = [len(hidden_ND), len(labels_N)]
    counts += [] if targets is None else [targets.num_positions]
    optional = (weights_N, label_logprobs_N, kd_factors_N, kd_ratios_N)
    counts += [len(each_N) for each_N in optional if each_N is not None]
    if len(set(counts)) > 1:
        raise ValueError(
            f"hidden states, labels, targets, weights, log-probs and ratios have {counts} positions, not one number"
        )
    weights_N = None if weights_N is None else weights_N.detach().to(torch.float32)
    is_counted_N = counted(labels_N, weights_N, ignore_index)
    count = is_counted_N.sum()
    if label_logprobs_N is not None:
        label_logprobs_N = label_logprobs_N.detach().float().masked_fill(~is_counted_N, torch.nan)
    if kd_ratios_N is not None:
        kd_ratios_N = torch.where(is_counted_N, kd_ratios_N.detach().float(), 0)
    if kd_factors_N is not None:
        kd_factors_N = kd_factors_N.contiguous()
    if hidden_ND.device.type != "cpu" and weights_N is None:
        labels_N = torch.where(is_counted_N, labels_N, 0)
        others = (label_logprobs_N, kd_factors_N, kd_ratios_N)
        return Positions(hidden_ND, labels_N, is_counted_N.float(), targets, count, *others)
    if int(count) < len(labels_N):
        index = is_counted_N.nonzero().squeeze(1)
        hidden_ND, labels_N = hidden_ND[index], labels_N[index]
        weights_N = None if weights_N is None else weights_N[index]
        targets = None if targets is None else targets.select(index)
        label_logprobs_N = None if label_logprobs_N is None else label_logprobs_N[index]
        kd_factors_N = None if kd_factors_N is None else kd_factors_N[index]
        kd_ratios_N = None if kd_ratios_N is None else kd_ratios_N[index]
    return Positions(
        hidden_ND, labels_N, weights_N, targets, count, label_logprobs_N, kd_factors_N, kd_ratios_N
    )


def with_checked_ids(positions: Positions, num_ids: int, num_vocab_ids: int) -> Positions:
    """The same positions, with no id outside the vocabulary.

    Raises   ValueError  on a CPU, for a label outside ``num_ids`` or an entry outside ``num_vocab_ids``
    """
    labels_N, targets, weights_N = positions.labels_N, positions.targets, positions.weights_N
    if labels_N.device.type == "cpu":
        _refuse_outside(labels_N, num_ids, "label {} is outside the head's {} ids")
        if targets is not None:
            with_checked_entries(targets, num_vocab_ids)
        return positions
    is_wrong_N = (labels_N < 0) | (labels_N >= num_ids)
    weights_N = torch.ones_like(labels_N, dtype=torch.float32) if weights_N is None else weights_N
    weights_N = weights_N.masked_fill(is_wrong_N, torch.nan)
    if targets is not None:
        targets, factor = with_checked_entries(targets, num_vocab_ids)
        weights_N = weights_N * factor
    return replace(
        positions, labels_N=labels_N.masked_fill(is_wrong_N, 0), weights_N=weights_N, targets=targets
    )


def with_checked_entries(targets: Targets, num_vocab_ids: int) -> tuple[Targets, Tensor]:
    """The same targets, with no id outside the vocabulary, and a factor () of the loss: one, or NaN.

    Ids must rise within a position: of an id that came twice the gradients would be added or overwritten,
    as the path taken has it.

    Raises   ValueError  on a CPU, for an entry outside ``num_vocab_ids``, or ids that do not rise
    """
    falls_E = _falls(targets)
    if targets.ids.device.type == "cpu":
        _refuse_outside(
            targets.ids, num_vocab_ids, "the targets' id {} is outside the {} ids of the vocabulary"
        )
        if falls_E.any():
            entry = int(falls_E.nonzero()[0])
            position = int(torch.searchsorted(targets.offsets, entry, right=True)) - 1
            raise ValueError(
                f"the targets' position {position} has id {int(targets.ids[entry])} after "
                f"{int(targets.ids[entry - 1])}; each id must come once, in rising order"
            )
        return targets, torch.ones(())
    is_wrong_E = (targets.ids < 0) | (targets.ids >= num_vocab_ids)
    is_wrong = is_wrong_E.any() | falls_E.any()
    factor = torch.ones((), device=targets.ids.device).masked_fill(is_wrong, torch.nan)
    return replace(targets, ids=targets.ids.masked_fill(is_wrong_E, 0)), factor


def _falls(targets: Targets) -> Tensor:
    """Whether an entry's id is not above the one before it at its position: (E + 1,) bool, the last one False."""
    falls = torch.zeros(targets.num_entries + 1, dtype=torch.bool, device=targets.ids.device)
    falls[1:-1] = targets.ids[1:] <= targets.ids[:-1]
    return falls.index_fill_(0, targets.offsets, False)


def _refuse_outside(ids: Tensor, num_ids: int, message: str) -> None:
    if ids.numel() == 0:
        return
    for found in torch.aminmax(ids):
        if not 0 <= int(found) < num_ids:
            raise ValueError(message.format(int(found), num_ids))
