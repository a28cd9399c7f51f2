"""The loss on a CPU: time and memory, side by side in one run.

    python -m tests.benchmarks.bench_loss

Times are of forward and backward, in rounds in which the variants take turns; ratios are medians over rounds.  They
are seconds of the processor, on one thread: other processes change them less than seconds of the clock.
Memory is physical: each variant runs alone in a fresh process, where the kernel's high-water mark of resident
memory (``VmHWM``) is reset once the inputs exist and every code path is warm.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kd_loss import KDLoss, fused_ce_kd
from shared.recipes.policies import Threshold
from shared.sparse import SparseTargets, position_seeds, sparsify
from tests.benchmarks.own_process import in_own_process
from tests.benchmarks.tables import FIGURES, Bench, figure

V, D, NUM_POSITIONS, CHUNK = 64_000, 256, 4096, 512
ROUNDS, CLOSE_ROUNDS = 5, 20  # matrix products scatter by a tenth from call to call: a close ratio needs many
MIB = 2**20


@dataclass
class Inputs:
    """Hidden states, head, labels, and a teacher that is as sure as large models are: see the first rows."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    targets: SparseTargets
    teacher_NV: Tensor | None = None

    @classmethod
    def make(cls, num_positions: int, *, with_dense_teacher: bool) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        hidden_ND = torch.randn(num_positions, D, generator=generator)
        weight_VD = torch.randn(V, D, generator=generator) / D**0.5
        labels_N = torch.randint(V, (num_positions,), generator=generator)
        seeds = position_seeds(0, b"bench", num_positions)
        sharpness_N = 3.5 * torch.exp(4 * torch.rand(num_positions, generator=generator))
        parts, dense = [], []
        for start in range(0, num_positions, 256):
            rows = slice(start, start + 256)
            teacher_CV = (hidden_ND[rows] @ weight_VD.t()) * sharpness_N[rows, None]
            parts.append(sparsify(teacher_CV.log_softmax(-1), Threshold(), seeds=seeds[rows]))
            dense += [teacher_CV] if with_dense_teacher else []
        return cls(
            hidden_ND.requires_grad_(),
            weight_VD.requires_grad_(),
            labels_N,
            SparseTargets.concat(parts),
            torch.cat(dense) if with_dense_teacher else None,
        )

    def clear(self) -> None:
        self.hidden_ND.grad = self.weight_VD.grad = None


def fused_ce(inputs: Inputs) -> None:
    sums = fused_ce_kd(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, kd_ratio=0.0, chunk_size=CHUNK)
    sums.loss.backward()


def fused_both(inputs: Inputs) -> None:
    sums = fused_ce_kd(
        inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, inputs.targets, kd_ratio=0.5, chunk_size=CHUNK
    )
    sums.loss.backward()


def eager_both(inputs: Inputs) -> None:
    """What one writes without a loss library; the dense teacher's logits are given, and not paid for."""
    assert inputs.teacher_NV is not None
    logits_NV = F.linear(inputs.hidden_ND, inputs.weight_VD)
    ce = F.cross_entropy(logits_NV, inputs.labels_N, reduction="sum")
    logq_NV, logp_NV = logits_NV.log_softmax(-1), inputs.teacher_NV.log_softmax(-1)
    kd = F.kl_div(logq_NV, logp_NV, reduction="sum", log_target=True)
    (0.5 * ce + 0.5 * kd).backward()


def times_s(
    inputs: Inputs,
    variants: list[Callable[[Inputs], None]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each variant in each round, after one round that does not count.

    They take turns, and every other round goes backwards, so that none always follows the same one.
    """
    seconds: list[list[float]] = [[] for _ in variants]
    for round_index in range(rounds + 1):
        pairs = list(zip(variants, seconds, strict=True))
        for variant, column in pairs if round_index % 2 else reversed(pairs):
            inputs.clear()
            start = clock()
            variant(inputs)
            column.append(clock() - start)
    return [column[1:] for column in seconds]


def ratio(numerator_s: list[float], denominator_s: list[float]) -> float:
    """The median over rounds: what else the machine does then weighs on both alike."""
    return statistics.median(a / b for a, b in zip(numerator_s, denominator_s, strict=True))


def status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """Resident memory, once what was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def _measure_peak(variant: Callable[[Inputs], None], num_positions: int, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    variant(Inputs.make(8, with_dense_teacher=True))
    inputs = Inputs.make(num_positions, with_dense_teacher=variant is eager_both)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    variant(inputs)
    return status_bytes("VmHWM") - before


def _measure_kept(chunk_size: int, num_positions: int, num_threads: int) -> int:
    """What stays resident between forward and backward of ``KDLoss``."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    student_NV = torch.randn(num_positions, V, generator=generator).requires_grad_()
    teacher_NV = torch.randn(num_positions, V, generator=generator)
    labels_N = torch.zeros(num_positions, dtype=torch.int64)
    loss_function = KDLoss(chunk_size=chunk_size)
    loss_function(student_NV[:8], teacher_NV[:8], labels_N[:8])
    before = resident_bytes()
    loss = loss_function(student_NV, teacher_NV, labels_N)
    kept = resident_bytes() - before
    loss.backward()
    return kept


def in_fresh_process(function: Callable[..., int], *arguments: object) -> int:
    found: int = in_own_process(function, *arguments, torch.get_num_threads())
    return found


def rows() -> list[tuple[str, str, str]]:
    """Under ``FIGURES``."""
    inputs = Inputs.make(NUM_POSITIONS, with_dense_teacher=True)
    targets = inputs.targets
    torch.set_num_threads(1)
    both_s, eager_s = times_s(inputs, [fused_both, eager_both], ROUNDS, clock=time.process_time)
    inputs.teacher_NV = None
    close_both_s, ce_s = times_s(inputs, [fused_both, fused_ce], CLOSE_ROUNDS, clock=time.process_time)
    del inputs
    both, eager = (in_fresh_process(_measure_peak, f, NUM_POSITIONS) for f in (fused_both, eager_both))
    small, large = (in_fresh_process(_measure_peak, fused_both, n) for n in (1024, 16_384))
    grad_row = D * 4
    chunked, unchunked = (in_fresh_process(_measure_kept, size, NUM_POSITIONS) for size in (512, 0))
    sure, unsure = (x.float().mean().item() for x in (targets.entropy < 0.5, targets.entropy > 3))
    of_memory = f" ({both / MIB:,.0f} MiB against {eager / MIB:,.0f} MiB)"
    without_gradient = (large - 16_384 * grad_row) / (small - 1024 * grad_row)
    against_eager = "fused CE + sparse KD against eager CE + dense KD"
    return [
        figure("teacher: positions under 0.5 nats of entropy", sure, ".2f"),
        figure("teacher: positions over 3 nats", unsure, ".2f"),
        figure("entries a position", targets.num_entries / NUM_POSITIONS, ".1f"),
        figure("fused CE + sparse KD, time", statistics.median(both_s), ".2f", unit=" s"),
        figure("fused CE + sparse KD against fused CE alone, time", ratio(close_both_s, ce_s), most=1.05),
        figure(f"{against_eager}, time", ratio(both_s, eager_s), most=0.45),
        figure(
            f"{against_eager}, peak memory beyond inputs and weights", both / eager, more=of_memory, most=0.08
        ),
        figure("peak memory at 16,384 positions against 1,024", large / small, most=1.05),
        figure("the same without the gradient of the hidden states", without_gradient, most=1.05),
        figure("`KDLoss`, dense teacher, chunk 512: kept for backward", chunked / MIB, ".0f", unit=" MiB"),
        figure("the same against unchunked", chunked / unchunked, most=0.55),
    ]


def main() -> None:
    bench = Bench("loss")
    notes = f"V = {V:,}, D = {D}, fp32, {NUM_POSITIONS:,} positions, chunks of {CHUNK}, one thread."
    bench.show("loss", "The loss on a CPU: time and memory", FIGURES, rows(), notes=notes)


if __name__ == "__main__":
    main()
