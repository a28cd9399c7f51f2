"""The teacher's last hidden states, stored; its head turns them into whole distributions while the student trains.

The rival nearest in kind: exact in fp32, at D numbers a position and one more head product in each step.  In bf16, or
in int8 with one scale for each position, it is exact but for that rounding.

Draft models for speculative decoding are trained so: SpecForge's offline mode stores hidden states and loads them in
training.  This is the same for a student's KD, written anew.

Legend: N positions, C of a chunk, V ids that the tokenizer knows, D hidden size of either model.
Source   docs.sglang.io/SpecForge/basic_usage/training.html ("Offline")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.kd_loss.gradients import add_product_, scaled
from shared.models.chunks import chunk_positions
from stage1_teacher.capturing.teacher import Teacher
from stage2_student.training.student import Forwarded, StudentWithLoss
from tests.benchmarks.peers.live import student_hidden
from tests.benchmarks.peers.method import forwarded, plain_weight
from tests.benchmarks.peers.store import StoredMethod

LARGEST = 127  # of an int8 that has its negative


@dataclass(frozen=True)
class HiddenStates(StoredMethod):
    form: Literal["fp32", "bf16", "int8"]

    def columns(self, teacher: Teacher, hidden_ND: Tensor) -> dict[str, Tensor]:
        return self.compress(hidden_ND)

    def once(self, teacher: Teacher) -> dict[str, Tensor]:
        return {"weight": plain_weight(teacher.head, teacher.num_token_ids).clone()}

    def compress(self, hidden_ND: Tensor) -> dict[str, Tensor]:
        """hidden (N, D) in its form; of int8 also scale (N,) fp32."""
        if self.form == "int8":
            scale_N = hidden_ND.float().abs().amax(1).clamp_min(1e-30) / LARGEST
            return {"hidden": (hidden_ND / scale_N[:, None]).round().to(torch.int8), "scale": scale_N}
        return {"hidden": hidden_ND.to({"fp32": torch.float32, "bf16": torch.bfloat16}[self.form])}

    def targets(self, columns: dict[str, Tensor]) -> Tensor:
        """(N, D) fp32, or bf16 as it was stored."""
        if self.form == "int8":
            return columns["hidden"] * columns["scale"][:, None]
        return columns["hidden"]

    def forward(self, once: dict[str, Tensor]) -> Callable[..., Forwarded]:
        teacher_VD = once["weight"]

        def forward(
            self: StudentWithLoss,
            inputs: dict[str, Tensor],
            index: Tensor,
            labels: Tensor,
            teacher_ND: Tensor,
            *others: object,
        ) -> Forwarded:
            hidden_ND, head = student_hidden(self, inputs, index)
            losses = ce_kd_with_head(
                hidden_ND,
                plain_weight(head, self.num_token_ids),
                labels,
                teacher_ND.to(teacher_VD.dtype),
                teacher_VD,
                kd_ratio=self.loss.kd_ratio,
                chunk_size=chunk_positions(self.loss.chunk_size, self.num_token_ids, hidden_ND.device),
            )
            return forwarded(*losses, len(labels))

        return forward


def ce_kd_with_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher_ND: Tensor,
    teacher_VD: Tensor,
    *,
    kd_ratio: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """CE and forward KL from both models' hidden states and heads, a chunk of positions at a time.

    As in ``fused_ce_kd``, gradients are made in the forward pass: of the student's logits it is
    q - (1 - kd_ratio) * (1 at the label) - kd_ratio * p.

    Returns  sums over positions of the mixed loss, CE and KD, () fp32 nats; the first has a graph
    Holds    equal to eager CE and dense KL of the same logits, value and gradients, whatever the chunk size
    """
    loss, ce, kd = _WithHead.apply(
        hidden_ND, weight_VD, labels_N, (teacher_ND, teacher_VD), kd_ratio, chunk_size
    )
    return loss, ce, kd


class _WithHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        teacher: tuple[Tensor, Tensor],
        kd_ratio: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher_ND, teacher_VD = teacher
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros(weight_VD.shape, device=weight_VD.device)
        ce, kd = torch.zeros(2, dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, start + chunk_size)
            logq_CV = (hidden_ND[chunk] @ weight_VD.t()).float().log_softmax(-1)
            logp_CV = (teacher_ND[chunk] @ teacher_VD.t()).float().log_softmax(-1)
            label_C1 = labels_N[chunk, None]
            ce -= logq_CV.gather(1, label_C1).sum()
            p_CV = logp_CV.exp()
            kd += logp_CV.sub_(logq_CV).mul_(p_CV).sum(-1).sum()
            slope_CV = logq_CV.exp_().sub_(p_CV.mul_(kd_ratio))
            slope_CV.scatter_add_(1, label_C1, slope_CV.new_full(label_C1.shape, kd_ratio - 1))
            slope_CV = slope_CV.to(hidden_ND.dtype)
            grad_ND[chunk] = slope_CV @ weight_VD
            add_product_(grad_VD, slope_CV, hidden_ND[chunk])
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype)
        ce, kd = ce.float(), kd.float()
        ctx.mark_non_differentiable(ce, kd)
        return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        return (*scaled(ctx.saved_tensors, ctx.dtypes, grad_loss), None, None, None, None)
