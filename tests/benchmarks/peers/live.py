"""The teacher beside the student, as in an online recipe: its forward pass in every step, its whole distribution.

    LiveTeacher()        eager CE and dense KD, as one writes them without a loss library
    LiveTeacher("trl")   the same with the loss of TRL's GKDTrainer, at beta 0: forward KL
    LiveTeacher("liger") Liger's chunked loss from hidden states and both heads, at beta 0, CE in it

Liger's is that of ``liger_kernel.chunked_loss``, which is plain PyTorch and runs on a CPU; it is not compiled here.
Its Triton kernels need a GPU: ``bench_gpu`` has them.

Legend: N positions of a microbatch, V ids that the tokenizer knows, D hidden size.
Source   github.com/huggingface/trl (trl/experimental/gkd), github.com/linkedin/Liger-Kernel (chunked_loss)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.kd_loss import KDLoss
from shared.models.chunks import chunk_positions
from shared.models.vlm import Head, in_dtype_of, last_hidden_states, split
from shared.recipes import Recipe
from shared.runtime import World
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage2_student.training.feed import Microbatch
from stage2_student.training.inputs import Inputs
from stage2_student.training.student import Forwarded, StudentWithLoss
from tests.benchmarks.peers.method import Lesson, forwarded, plain_weight

Package = Literal["trl", "liger"]
MODULES: dict[Package, str] = {"trl": "trl", "liger": "liger_kernel"}
DenseKd = Callable[[Tensor, Tensor], Tensor]  # of student's and teacher's logits (N, V), a sum


def is_installed(package: Package) -> bool:
    return importlib.util.find_spec(MODULES[package]) is not None


@dataclass(frozen=True)
class LiveTeacher:
    """package  whose loss it is; None: that of ``KDLoss``"""

    package: Package | None = None

    def open(self, recipe: Recipe, inputs: Inputs, world: World, folder: Path) -> Lesson:
        assert recipe.teacher is not None
        num_ids = inputs.processor.num_token_ids
        teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)
        held = num_bytes(teacher.model)
        if self.package == "liger":
            return Lesson(teach=_hidden(teacher), forward=liger_forward(teacher.head), held_bytes=held)
        kd = trl_kd() if self.package == "trl" else _kd
        return Lesson(teach=_logits(teacher), forward=dense_forward(kd), held_bytes=held)


def num_bytes(module: nn.Module) -> int:
    """Of its weights, shared ones once."""
    return sum(one.numel() * one.element_size() for one in module.parameters())


def _logits(teacher: Teacher) -> Callable[[Microbatch], Microbatch]:
    @torch.no_grad()
    def teach(microbatch: Microbatch) -> Microbatch:
        logits_NV = teacher.head.logits(teacher.hidden(microbatch))  # type: ignore[arg-type]
        return replace(microbatch, targets=logits_NV[:, : teacher.num_token_ids].clone())  # type: ignore[arg-type]

    return teach


def _hidden(teacher: Teacher) -> Callable[[Microbatch], Microbatch]:
    @torch.no_grad()
    def teach(microbatch: Microbatch) -> Microbatch:
        hidden_ND = teacher.hidden(microbatch).clone()  # type: ignore[arg-type]
        return replace(microbatch, targets=hidden_ND)  # type: ignore[arg-type]

    return teach


def _kd(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    labels = logits_NV.new_zeros(len(logits_NV), dtype=torch.int64)  # any: all positions count
    return KDLoss()(logits_NV, teacher_NV, labels, num_batch_labels=1)


def trl_kd() -> DenseKd:
    from trl.experimental.gkd import GKDTrainer

    def kd(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(logits_NV, teacher_NV, beta=0, reduction="sum")

    return kd


def dense_forward(kd_of: DenseKd) -> Callable[..., Forwarded]:
    """Eager cross-entropy and dense KD, from logits; what else a microbatch holds is for losses that it has not."""

    def forward(
        self: StudentWithLoss,
        inputs: dict[str, Tensor],
        index: Tensor,
        labels: Tensor,
        teacher_NV: Tensor,
        *others: object,
    ) -> Forwarded:
        hidden_ND, head = student_hidden(self, inputs, index)
        logits_NV = head.logits(hidden_ND)[:, : self.num_token_ids]
        ce = F.cross_entropy(logits_NV.float(), labels, reduction="sum")
        kd = kd_of(logits_NV, teacher_NV)
        loss = (1 - self.loss.kd_ratio) * ce + self.loss.kd_ratio * kd
        return forwarded(loss, ce, kd, len(labels))

    return forward


def liger_forward(teacher_head: Head) -> Callable[..., Forwarded]:
    """Liger's loss; the targets are the teacher's hidden states."""

    def forward(
        self: StudentWithLoss,
        inputs: dict[str, Tensor],
        index: Tensor,
        labels: Tensor,
        teacher_ND: Tensor,
        *others: object,
    ) -> Forwarded:
        hidden_ND, head = student_hidden(self, inputs, index)
        weight_VD = plain_weight(head, self.num_token_ids)
        teacher_VD = plain_weight(teacher_head, self.num_token_ids).to(hidden_ND.dtype)
        chunk_size = chunk_positions(self.loss.chunk_size, len(weight_VD), hidden_ND.device)
        losses = liger_losses(
            hidden_ND,
            weight_VD,
            labels,
            teacher_ND.to(hidden_ND.dtype),
            teacher_VD,
            kd_ratio=self.loss.kd_ratio,
            chunk_size=chunk_size,
        )
        return forwarded(*losses, len(labels))

    return forward


def liger_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher_ND: Tensor,
    teacher_VD: Tensor,
    *,
    kd_ratio: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of loss, CE and KD; Liger's own are means."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - kd_ratio,
        weight_soft_loss=kd_ratio,
        beta=0.0,
        compiled=False,
        chunk_size=chunk_size,
        return_soft_hard_loss=True,
    )
    loss, kd, ce = loss_of(hidden_ND, weight_VD, teacher_ND, teacher_VD, labels_N)
    return loss * len(labels_N), ce * len(labels_N), kd * len(labels_N)


def student_hidden(student: StudentWithLoss, inputs: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Head]:
    """Hidden states (N, D) of the positions, and the head."""
    body, head = split(student.model)
    hidden_BSD = last_hidden_states(body, in_dtype_of(head, inputs))
    return hidden_BSD.flatten(0, 1).index_select(0, index), head
