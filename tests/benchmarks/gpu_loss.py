"""The fused loss against its own matrix products, against CE alone, and against other implementations.

Variants take turns; times are medians.  The products alone run in the same chunks with the same fp32 sum for the
head's gradient, and once more unchunked in the head's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import is_out_of_memory
from shared.kd_loss import fused_ce_kd
from shared.kd_loss.chunk import logits_buffer
from shared.kd_loss.gradients import add_to_pieces_, zero_pieces
from shared.models.chunks import chunk_positions
from shared.recipes.policies import Policy, Threshold, TopK
from shared.sparse import SparseTargets, position_seeds, sparsify
from tests.benchmarks.gpu_figures import GIB, Figure, peak_gib, taking_turns

QWEN, GEMMA, LLAMA = 248_320, 262_144, 128_256  # ids of their vocabularies
SLOWEST_MS = {(QWEN, 2560): 50.0, (QWEN, 4096): 80.0}  # of 8,192 positions
MOST_AGAINST_PRODUCTS, MOST_AGAINST_CE, MOST_GIB = 1.15, 1.03, 1.5
TINY = 32  # the part of each size that is left of it


@dataclass(frozen=True)
class Shape:
    """Vocabulary, hidden size, answer positions, and positions of a chunk."""

    num_ids: int
    hidden_size: int
    num_positions: int
    chunk_size: int | Literal["auto"] = "auto"

    def tiny(self) -> Shape:
        chunk = self.chunk_size if self.chunk_size == "auto" else max(4, self.chunk_size // TINY)
        sizes = (self.num_ids, self.hidden_size, self.num_positions)
        return Shape(*(max(4, size // TINY) for size in sizes), chunk)

    def __str__(self) -> str:
        sizes = f"V {self.num_ids:,}, D {self.hidden_size:,}, {self.num_positions:,} positions"
        return f"{sizes}, chunk {self.chunk_size}"


FIRST = [Shape(QWEN, hidden_size, 8192) for hidden_size in (2560, 4096, 5120)]
CHUNKS = [Shape(QWEN, 2560, 8192, chunk_size) for chunk_size in (512, 1024, 1536, 2048, 4096)]
POSITIONS = [Shape(QWEN, 2560, num_positions) for num_positions in (64, 512, 1024, 4096, 16_384)]
OTHER_VOCABULARIES = [Shape(GEMMA, 2560, 8192), Shape(QWEN + 1, 2560, 8192), Shape(LLAMA, 4096, 8192)]


@dataclass
class Inputs:
    """Hidden states and head, labels, and sparse targets of a teacher that is nearly the student."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    targets: SparseTargets
    chunk_size: int

    @classmethod
    def make(cls, shape: Shape, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=torch.bfloat16)

        hidden_ND = randn(shape.num_positions, shape.hidden_size)
        weight_VD = randn(shape.num_ids, shape.hidden_size) / shape.hidden_size**0.5
        labels_N = torch.randint(shape.num_ids, (shape.num_positions,), generator=generator, device=device)
        targets = taught(hidden_ND, weight_VD, Threshold())
        chunk_size = chunk_positions(shape.chunk_size, shape.num_ids, device)
        return cls(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), labels_N, targets, chunk_size)

    def clear(self) -> None:
        self.hidden_ND.grad = self.weight_VD.grad = None


@torch.no_grad()
def taught(hidden_ND: Tensor, weight_VD: Tensor, policy: Policy) -> SparseTargets:
    """By a teacher with the student's logits, from soft to sharp within each 256 positions."""
    seeds = position_seeds(0, b"bench", len(hidden_ND)).to(hidden_ND.device)
    parts = []
    for hidden_CD, seeds_C in zip(hidden_ND.split(256), seeds.split(256), strict=True):
        sharpness_C = torch.linspace(1, 7, len(hidden_CD), device=hidden_ND.device)
        teacher_CV = (hidden_CD @ weight_VD.t()).float() * sharpness_C[:, None]
        parts.append(sparsify(teacher_CV.log_softmax(-1), policy, seeds=seeds_C))
    return SparseTargets.concat(parts)


def fused(inputs: Inputs, *, kd_ratio: float) -> None:
    inputs.clear()
    targets = inputs.targets if kd_ratio else None
    fused_ce_kd(
        inputs.hidden_ND,
        inputs.weight_VD,
        inputs.labels_N,
        targets,
        kd_ratio=kd_ratio,
        chunk_size=inputs.chunk_size,
    ).loss.backward()


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """The three products of the fused loss, in its chunks and its memory: padded rows are faster for any V."""
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    pieces = zero_pieces(weight_VD, torch.float32, weight_VD.dtype)
    num_ids = len(weight_VD)
    buffer_CV = logits_buffer(inputs.chunk_size, num_ids, like=hidden_ND)[:, :num_ids]
    for hidden_CD in hidden_ND.split(inputs.chunk_size):
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: len(hidden_CD)])
        torch.mm(logits_CV, weight_VD)
        add_to_pieces_(pieces, logits_CV, hidden_CD)


@torch.no_grad()
def products_at_once(inputs: Inputs) -> None:
    """The same three products over all positions, in bf16 throughout."""
    logits_NV = inputs.hidden_ND @ inputs.weight_VD.t()
    torch.mm(logits_NV, inputs.weight_VD)
    torch.mm(logits_NV.t(), inputs.hidden_ND)


def measure(shape: Shape, device: torch.device) -> Iterator[Figure]:
    inputs = Inputs.make(shape, device)
    ce, both, chunked, whole = taking_turns(
        [
            partial(fused, inputs, kd_ratio=0.0),
            partial(fused, inputs, kd_ratio=0.5),
            partial(products, inputs),
            partial(products_at_once, inputs),
        ],
        device,
    )
    is_judged = shape.chunk_size == "auto" and shape.num_positions >= 4096
    slowest = SLOWEST_MS.get((shape.num_ids, shape.hidden_size)) if shape.num_positions == 8192 else None
    yield Figure(f"{shape} ({inputs.chunk_size}): CE + KD", both, "ms", slowest if is_judged else None)
    yield Figure(
        "- against its products, in the same chunks",
        both / chunked,
        "",
        MOST_AGAINST_PRODUCTS if is_judged else None,
    )
    yield Figure("- against its products, all at once", both / whole, "")
    yield Figure("- against CE alone", both / ce, "", MOST_AGAINST_CE if is_judged else None)
    if device.type == "cuda":
        inputs.clear()
        beyond_gib = (
            peak_gib(partial(fused, inputs, kd_ratio=0.5)) - 4 * inputs.weight_VD.numel() / GIB
        )  # fp32
        yield Figure("- peak beyond the head's gradient", beyond_gib, "GiB", MOST_GIB if is_judged else None)


def sweep(shapes: list[Shape], device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """One that does not fit into memory is named, and the others go on."""
    for each in shapes:
        shape = each.tiny() if tiny else each
        try:
            yield from measure(shape, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"  left out: {shape}: {str(error).splitlines()[0]}", flush=True)


# --- other implementations -----------------------------------------------------------------------------------


def eager(inputs: Inputs, teacher_weight_VD: Tensor) -> None:
    """CE and dense KL of fp32 logits, as written in a training loop without a fused loss."""
    inputs.clear()
    logits_NV = (inputs.hidden_ND @ inputs.weight_VD.t()).float()
    with torch.no_grad():
        teacher_NV = (inputs.hidden_ND @ teacher_weight_VD.t()).float().log_softmax(-1)
    ce = F.cross_entropy(logits_NV, inputs.labels_N, reduction="sum")
    kd = F.kl_div(logits_NV.log_softmax(-1), teacher_NV, log_target=True, reduction="sum")
    (0.5 * ce + 0.5 * kd).backward()


def liger_ce(inputs: Inputs) -> None:
    """Liger's fused linear CE."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    inputs.clear()
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss(inputs.weight_VD, inputs.hidden_ND, inputs.labels_N).backward()


def liger_jsd(inputs: Inputs, teacher_weight_VD: Tensor) -> None:
    """Liger's fused linear JSD at beta 0, which is forward KL with a live teacher's head."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    inputs.clear()
    teacher_ND = inputs.hidden_ND.detach()
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    loss(inputs.hidden_ND, inputs.weight_VD, teacher_ND, teacher_weight_VD, shift_labels=None).backward()


def compare(device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """With others, at a size where their logits fit; what is not installed, or fails, is named."""
    shape = Shape(QWEN, 2560, 4096).tiny() if tiny else Shape(QWEN, 2560, 4096)
    inputs = Inputs.make(shape, device)
    teacher_weight_VD = (inputs.weight_VD.detach() * 3).contiguous()
    kept = TopK(k=min(64, len(inputs.weight_VD) // 2))
    with_bucket = replace(inputs, targets=taught(inputs.hidden_ND, inputs.weight_VD, kept))
    variants: dict[str, Callable[[], object]] = {
        "ours, CE alone": partial(fused, inputs, kd_ratio=0.0),
        "ours, CE + KD from a cache": partial(fused, inputs, kd_ratio=0.5),
        f"ours, CE + KD from a cache of top_k {kept.k}, a bucket for the rest": partial(
            fused, with_bucket, kd_ratio=0.5
        ),
        "eager, CE + dense KL, the teacher's head live": partial(eager, inputs, teacher_weight_VD),
        "Liger, fused linear CE": partial(liger_ce, inputs),
        "Liger, fused linear JSD, the teacher's head live": partial(liger_jsd, inputs, teacher_weight_VD),
    }
    for name, variant in list(variants.items()):
        try:
            variant()
        except Exception as error:
            print(f"  left out: {name}: {error}")
            del variants[name]
    times = taking_turns(list(variants.values()), device)
    for (name, variant), time_ms in zip(variants.items(), times, strict=True):
        yield Figure(f"{shape}: {name}", time_ms, "ms")
        if device.type == "cuda":
            inputs.clear()
            yield Figure("- peak", peak_gib(variant), "GiB")
