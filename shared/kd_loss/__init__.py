"""The distillation loss of both stages: chunked, in closed form, from dense or sparse teachers.

``fused_ce_kd`` goes from hidden states to the mixed loss without ever holding all logits (stage 2 trains
with it), and gives sums over positions; ``KDLoss`` starts from logits, and gives their mean.  Both are in
nats, fp32 or wider.  The derivation is in docs/loss.md.
"""

from __future__ import annotations

from shared.kd_loss.dense import KDLoss
from shared.kd_loss.divergences import DIVERGENCES, FORWARD_KL, Divergence
from shared.kd_loss.fused import LossSums, PositionLosses, ce_kd_by_position, fused_ce_kd

__all__ = [
    "DIVERGENCES",
    "FORWARD_KL",
    "Divergence",
    "KDLoss",
    "LossSums",
    "PositionLosses",
    "ce_kd_by_position",
    "fused_ce_kd",
]
