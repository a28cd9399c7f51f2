"""How positions count in training: ``loss.visual_weight``, ``loss.positions`` and ``loss.own_kd_ratio``.

    emphasis = Emphasis.of(recipe, cache, keys, has_own=True)    # None where all count alike
    weighing = emphasis.weigh(cache, rows, targets, lengths, own_N)    # of a microbatch, in a data-loader worker
    scores("kl", weighing, labels_N, targets, ...)              # in the forward: what positions are chosen by

All depend on the example alone, so the numbers of positions that divide a step are known before its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.cache import Cache, MixedRow, Row
from shared.cache.index import Keys
from shared.kd_loss import ce_kd_by_position
from shared.kd_loss.kept import num_kept
from shared.kd_loss.uncertainty import same_on_all, student_entropy
from shared.kd_loss.vocab_parallel import local_part
from shared.recipes import LossConfig, Recipe
from shared.sparse import RegroupedTargets, Targets
from stage2_student.training.visual_weight import VisualWeight


@dataclass(frozen=True, eq=False)
class Weighing:
    """How the N positions of a microbatch count.

    weights_N   (N,) fp32, which average one over the training rows; None: one each
    lengths     positions of each example
    keep        the share of each example's positions that is kept; None: all
    entropy_N   the teacher's, (N,) fp32 nats, where positions are chosen by it
    kd_scale    factor of KD at a kept position, where CE is over all: so many positions of the step are there for
                each that is kept
    kd_ratio_N  (N,) fp32; None: that of the loss
    """

    weights_N: Tensor | None
    lengths: tuple[int, ...]
    keep: float | None = None
    entropy_N: Tensor | None = None
    kd_scale: float = 1.0
    kd_ratio_N: Tensor | None = None

    @property
    def num_kept(self) -> int:
        return sum(self.lengths) if self.keep is None else sum(num_kept(self.lengths, self.keep))

    def each(self, move: Callable[[Tensor], Tensor]) -> Weighing:
        """With its tensors as ``move`` makes them."""
        moved = [
            None if one is None else move(one) for one in (self.weights_N, self.entropy_N, self.kd_ratio_N)
        ]
        return replace(self, weights_N=moved[0], entropy_N=moved[1], kd_ratio_N=moved[2])


@dataclass(frozen=True)
class Emphasis:
    """loss  the recipe's"""

    visual: VisualWeight | None
    loss: LossConfig

    @classmethod
    def of(cls, recipe: Recipe, cache: Cache | None, keys: Keys, *, has_own: bool) -> Emphasis | None:
        """None where all positions count alike; ``keys`` of the training rows.

        has_own  whether the student wrote answers of some of them
        Raises as ``VisualWeight.of``
        """
        loss = recipe.loss
        visual = None if cache is None else VisualWeight.of(recipe, cache, keys)
        if not has_own:
            loss = loss.model_copy(update={"own_kd_ratio": None})
        if visual is None and loss.positions is None and loss.own_kd_ratio is None:
            return None
        return cls(visual, loss)

    def weigh(
        self,
        cache: Cache | None,
        rows: Sequence[Row | MixedRow],
        targets: Targets | None,
        lengths: Sequence[int],
        own_N: Tensor,
    ) -> Weighing:
        """Of the examples of some rows; no cache and no targets where training has none.

        Shapes   own_N (N,) bool, whether the student wrote the label
        """
        loss = self.loss
        weights_N = entropy_N = kd_ratio_N = None
        if self.visual is not None and cache is not None:
            gains_N = cache.label_gains(rows)  # type: ignore[arg-type]  # its own rows
            weights_N = self.visual.of_positions(gains_N)
        if loss.positions is not None and loss.positions.by == "teacher_entropy" and targets is not None:
            assert not isinstance(targets, RegroupedTargets)  # which the recipe refuses
            entropy_N = targets.entropy[:, targets.temperatures.index(loss.temperature)]
        if loss.own_kd_ratio is not None and own_N.any():
            kd_ratio_N = torch.full(own_N.shape, loss.kd_ratio).masked_fill(own_N, loss.own_kd_ratio)
        keep = None if loss.positions is None else loss.positions.keep
        return Weighing(weights_N, tuple(lengths), keep, entropy_N, kd_ratio_N=kd_ratio_N)


@torch.no_grad()
def scores(
    by: str,
    weighing: Weighing,
    labels_N: Tensor,
    targets: Targets | None,
    *,
    temperature: float,
    **inputs: Any,
) -> Tensor:
    """What positions are chosen by, (N,): the highest are kept; the same on all ranks that split the head.

    by      of ``loss.positions``
    inputs  hidden states, head and settings, as ``ce_kd_by_position`` takes them
    """
    if weighing.entropy_N is not None:
        return weighing.entropy_N
    if by == "student_entropy":
        names = ("hidden_ND", "weight_VD", "bias_V", "softcap", "chunk_size")
        return student_entropy(labels_N=labels_N, **{name: inputs[name] for name in names})
    found = ce_kd_by_position(labels_N=labels_N, targets=targets, temperature=temperature, **inputs)
    return same_on_all(found.kd_N, local_part(inputs["weight_VD"], 0, None)[1])
