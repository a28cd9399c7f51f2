"""Students that are sure: inputs whose mass outside, or at, the kept ids is as small as 1e-30.

The fused loss, the loss from logits, the ranks' and the kernel's tests share them.  Logits have few bits, so
that one reference serves all dtypes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from mpmath import mp, mpf
from torch import Tensor

from shared.recipes.policies import TopK
from shared.sparse import SparseTargets
from tests import reference_exact

KEPT, NUM_IDS = [0, 3], 6
TAILS = [
    *((tail, "forward_kl") for tail in ("ghost", "uniform", "renormalize", "drop")),
    *(("ghost", kind) for kind in ("reverse_kl", "jensen_shannon", "total_variation")),
]
GAPS = [2.0, 7.0, 18.0, 28.0, 46.0, 70.0]  # in nats: masses from 1e-1 to 1e-30
TEACHERS = {"unsure": [0.7, 0.2], "sure": [0.999, 0.0009]}
# Of the largest gradient.  The logits' own rounding moves a mass by a relative eps times the gap.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class TailCase:
    """Rows of student logits (N, V), one for each of ``GAPS``, and the teacher's targets for them."""

    logits: Tensor
    labels: Tensor
    targets: SparseTargets
    temperature: float

    def expected(self, *, kd_ratio: float, tail: str, kind: str) -> tuple[float, Tensor]:
        """The sum of the rows' losses, and the gradient (N, V) fp64."""
        log_masses = self.targets.logprobs[: len(KEPT)].double() / self.temperature
        if self.temperature != 1.0:
            log_masses -= self.targets.log_normalizers[0, 0].double()
        rows = [
            _exact(tuple(row), label, tuple(log_masses.tolist()), kd_ratio, self.temperature, tail, kind)
            for row, label in zip(self.logits.double().tolist(), self.labels.tolist(), strict=True)
        ]
        return sum(loss for loss, _ in rows), torch.tensor([grad for _, grad in rows], dtype=torch.float64)


@functools.cache
def _exact(
    row: tuple[float, ...],
    label: int,
    log_masses: tuple[float, ...],
    kd_ratio: float,
    temperature: float,
    tail: str,
    kind: str,
) -> tuple[float, list[float]]:
    with mp.workdps(reference_exact.DIGITS):
        masses = [mp.exp(mpf(log_mass)) for log_mass in log_masses]
    return reference_exact.loss_and_gradient(
        list(row), label, KEPT, masses, kd_ratio=kd_ratio, temperature=temperature, tail=tail, kind=kind
    )


def tail_case(dtype: torch.dtype, *, temperature: float, teacher: str, small: str) -> TailCase:
    """``small``: which ids the student gives so little, those ``outside`` the kept ones or the ``kept`` ones."""
    lowered = [i for i in range(NUM_IDS) if (i in KEPT) == (small == "kept")]
    logits = torch.tensor([1.5, 0.0, 0.5, 1.0, -1.0, 2.0], dtype=torch.float64).repeat(len(GAPS), 1)
    logits[:, lowered] -= torch.tensor(GAPS, dtype=torch.float64)[:, None]
    labels = torch.tensor([0, 1] * (len(GAPS) // 2))
    return TailCase((logits * temperature).to(dtype), labels, _targets(teacher), temperature)


def _targets(teacher: str) -> SparseTargets:
    num_rows, masses = len(GAPS), torch.tensor(TEACHERS[teacher], dtype=torch.float64)
    one_row = SparseTargets(
        offsets=torch.tensor([0, len(KEPT)]),
        ids=torch.tensor(KEPT, dtype=torch.int32),
        logprobs=masses.log().half(),
        policy=TopK(k=len(KEPT)),
        temperatures=(1.0, 2.0),
        log_normalizers=torch.tensor([[math.log(1.05 * float(masses.sqrt().sum()))]]),
        entropy=torch.zeros(1, 2),
        draw_counts=torch.zeros(0, dtype=torch.int32),
    )
    return SparseTargets.concat([one_row] * num_rows)


def assert_rows_agree(got: Tensor, want: Tensor, dtype: torch.dtype, *, atol: float = 0.0) -> None:
    """Each row up to a part of its largest gradient: what is left of a small one must be right, too."""
    error, largest = (got.double() - want).abs().amax(-1), want.abs().amax(-1)
    assert bool((error <= TOLERANCES[dtype] * largest + atol).all()), (error / largest).tolist()
