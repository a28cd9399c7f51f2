"""The fused loss on an NVIDIA GPU: time against its own matrix products, and memory.

    python -m tests.benchmarks.bench_loss_gpu

Times are medians of CUDA events over rounds in which the variants take turns.  The products alone are run in
the same chunks with the same fp32 sum for the head's gradient, and once more unchunked in plain bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kd_loss import fused_ce_kd
from shared.kd_loss.gradients import add_product_
from shared.recipes.policies import Threshold
from shared.sparse import SparseTargets, position_seeds, sparsify

ROUNDS = 7
GIB = 2**30


@dataclass
class Inputs:
    """bf16 hidden states and head, labels, and sparse targets of a teacher that is nearly the student."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    targets: SparseTargets
    chunk_size: int

    @classmethod
    def make(cls, num_positions: int, num_ids: int, hidden_size: int, chunk_size: int) -> Inputs:
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        hidden_ND, weight_VD = (
            randn(num_positions, hidden_size),
            randn(num_ids, hidden_size) / hidden_size**0.5,
        )
        labels_N = torch.randint(num_ids, (num_positions,), generator=generator, device="cuda")
        seeds = position_seeds(0, b"bench", num_positions).cuda()
        parts = []
        for start in range(0, num_positions, 256):
            rows = slice(start, start + 256)
            sharpness_C = torch.linspace(1, 7, len(labels_N[rows]), device="cuda")
            teacher_CV = (hidden_ND[rows] @ weight_VD.t()).float() * sharpness_C[:, None]
            parts.append(sparsify(teacher_CV.log_softmax(-1), Threshold(), seeds=seeds[rows]))
        targets = SparseTargets.concat(parts)
        return cls(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), labels_N, targets, chunk_size)


def fused_ce(inputs: Inputs) -> None:
    fused_ce_kd(
        inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, kd_ratio=0.0, chunk_size=inputs.chunk_size
    ).loss.backward()


def fused_both(inputs: Inputs) -> None:
    fused_ce_kd(
        inputs.hidden_ND,
        inputs.weight_VD,
        inputs.labels_N,
        inputs.targets,
        kd_ratio=0.5,
        chunk_size=inputs.chunk_size,
    ).loss.backward()


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """The three products of the fused loss, in its chunks."""
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    grad_VD = torch.zeros(weight_VD.shape, device="cuda")
    buffer_CV = hidden_ND.new_empty(inputs.chunk_size, len(weight_VD))
    for hidden_CD in hidden_ND.split(inputs.chunk_size):
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: len(hidden_CD)])
        torch.mm(logits_CV, weight_VD)
        add_product_(grad_VD, logits_CV, hidden_CD)


@torch.no_grad()
def products_at_once(inputs: Inputs) -> None:
    """The same three products over all positions, in bf16 throughout."""
    logits_NV = inputs.hidden_ND @ inputs.weight_VD.t()
    torch.mm(logits_NV, inputs.weight_VD)
    torch.mm(logits_NV.t(), inputs.hidden_ND)


def times_ms(inputs: Inputs, variants: list[Callable[[Inputs], None]]) -> list[float]:
    """Median milliseconds of each variant; they take turns, after two rounds that do not count."""
    milliseconds: list[list[float]] = [[] for _ in variants]
    for _ in range(ROUNDS + 2):
        for variant, column in zip(variants, milliseconds, strict=True):
            inputs.hidden_ND.grad = inputs.weight_VD.grad = None
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            variant(inputs)
            stop.record()
            torch.cuda.synchronize()
            column.append(start.elapsed_time(stop))
    return [statistics.median(column[2:]) for column in milliseconds]


def peak_gib(inputs: Inputs) -> float:
    """Beyond inputs, weights and the head's gradient, which is fp32 until backward hands it over."""
    inputs.hidden_ND.grad = inputs.weight_VD.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_both(inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - 4 * inputs.weight_VD.numel()) / GIB


def measure(num_positions: int, num_ids: int, hidden_size: int, chunk_size: int) -> None:
    inputs = Inputs.make(num_positions, num_ids, hidden_size, chunk_size)
    ce, both, chunked, whole = times_ms(inputs, [fused_ce, fused_both, products, products_at_once])
    print(
        f"  {num_ids:>7} {hidden_size:>5} {num_positions:>6} {chunk_size:>5}   {both:>8.1f} ms"
        f"   {both / chunked:>6.3f} {both / whole:>6.3f}   {both / ce:>6.3f}   {peak_gib(inputs):>6.2f} GiB"
    )


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench_loss_gpu: no NVIDIA GPU here; these figures need one (see docs/benchmarks.md)"
        )
    print(f"fused CE + sparse KD, bf16, on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("  against its products: in the same chunks (<= 1.15), all at once; against CE alone (<= 1.03);")
    print("  peak beyond inputs, weights and the head's gradient (<= 1.5 GiB)")
    print("        V     D      N chunk         time   chunks   once    CE       peak")
    for hidden_size in (2560, 4096):
        for num_positions in (1024, 4096, 16_384):
            for chunk_size in (512, 2048):
                measure(num_positions, 248_320, hidden_size, chunk_size)
    print("  peers' own reports: 129 ms and 2.0 GB (linear KL, A100), 61 ms and 11.1 GB (JSD + CE, H100)")
    for chunk_size in (512, 2048):
        measure(8192, 128_256, 4096, chunk_size)


if __name__ == "__main__":
    main()
