"""What training on a share of the positions saves: head and loss at the kept ones, against all of them.

    python -m tests.benchmarks.bench_positions

Times are of forward and backward, what chooses the positions included, in rounds in which the variants take turns;
ratios are medians over rounds.  They are seconds of the processor, on one thread: other processes change them less
than seconds of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from shared.kd_loss import ce_kd_by_position, fused_ce_kd
from shared.kd_loss.kept import highest, num_kept
from shared.kd_loss.uncertainty import student_entropy
from tests.benchmarks.bench_loss import CHUNK, D, Inputs, V, ratio, times_s
from tests.benchmarks.tables import Bench

NUM_POSITIONS, LENGTH, ROUNDS = 1024, 64, 5
KEEP = 0.2
LENGTHS = [LENGTH] * (NUM_POSITIONS // LENGTH)


def scores(inputs: Inputs, by: str) -> Tensor:
    """What positions are chosen by; that of the teacher comes with the targets."""
    if by == "teacher_entropy":
        return inputs.targets.entropy[:, 0]
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    if by == "student_entropy":
        return student_entropy(hidden_ND, weight_VD, inputs.labels_N, chunk_size=CHUNK)
    return ce_kd_by_position(hidden_ND, weight_VD, inputs.labels_N, inputs.targets, chunk_size=CHUNK).kd_N


def on_all(inputs: Inputs) -> None:
    sums = fused_ce_kd(
        inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, inputs.targets, kd_ratio=0.5, chunk_size=CHUNK
    )
    sums.loss.backward()


def on_kept(inputs: Inputs, *, by: str, keep: float = KEEP) -> None:
    index = highest(scores(inputs, by), LENGTHS, keep)
    sums = fused_ce_kd(
        inputs.hidden_ND[index],
        inputs.weight_VD,
        inputs.labels_N[index],
        inputs.targets.select(index),
        kd_ratio=0.5,
        chunk_size=CHUNK,
    )
    sums.loss.backward()


def kd_on_kept(inputs: Inputs, *, by: str) -> None:
    """CE over all."""
    found = scores(inputs, by)
    index = highest(found, LENGTHS, KEEP)
    sums = fused_ce_kd(
        inputs.hidden_ND,
        inputs.weight_VD,
        inputs.labels_N,
        inputs.targets,
        kd_ratio=0.5,
        kd_factors_N=torch.zeros_like(found).index_fill(0, index, 1 / KEEP),
        chunk_size=CHUNK,
    )
    sums.loss.backward()


BY = ("teacher_entropy", "student_entropy", "kl")
VARIANTS: dict[str, tuple[Callable[[Inputs], None], str]] = {
    "all positions": (on_all, "1"),
    **{f"kept, by {by}": (partial(on_kept, by=by), "0.20" if by == BY[0] else "0.53") for by in BY},
    "half kept, by teacher_entropy": (partial(on_kept, by=BY[0], keep=0.5), "0.50"),
    **{
        f"KD at the kept, CE at all, by {by}": (partial(kd_on_kept, by=by), "1" if by == BY[0] else "1.33")
        for by in BY
    },
}


def rows() -> list[tuple[str, str, str]]:
    """What was measured, its time against that of all positions, and the products with the head against theirs."""
    inputs = Inputs.make(NUM_POSITIONS, with_dense_teacher=False)
    torch.set_num_threads(1)
    variants = [variant for variant, _ in VARIANTS.values()]
    seconds = times_s(inputs, variants, ROUNDS, clock=time.process_time)
    return [
        (name, f"{ratio(found, seconds[0]):.2f}", products)
        for (name, (_, products)), found in zip(VARIANTS.items(), seconds, strict=True)
    ]


def main() -> None:
    bench = Bench("positions")
    kept = sum(num_kept(LENGTHS, KEEP))
    notes = (
        f"{kept} of {NUM_POSITIONS:,} positions kept, in answers of {LENGTH}. V = {V:,}, D = {D}, fp32, chunks of "
        f"{CHUNK}, one thread of a CPU."
    )
    head = ("head and loss at", "time", "products with the head")
    bench.show("positions", "A share of the positions against all of them", head, rows(), notes=notes)


if __name__ == "__main__":
    main()
