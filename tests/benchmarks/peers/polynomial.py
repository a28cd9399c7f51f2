"""DistillKit's compressed log-probs: the likeliest ids, the first of them exact, the others on a fitted curve.

A position has the k likeliest ids in the order of their log-probs.  The first ``exact_k`` log-probs are stored in
bf16.  Those behind them are replaced by a sum of powers of their place t = 0, 1, ..., whose fp32 coefficients are a
least-squares fit.  Ids are packed, with as many bits as the vocabulary needs.

    Polynomial.recommended()   k 128, 16 of them exact, powers 0 to 4 and a square root; "used for new captures"
    Polynomial.budget()        k 50, 1 of them exact, powers 0 and 1 and a square root; "a little tight on storage"

What DistillKit calls ``missing_probability_handling`` is the tail of the loss: its ``zero`` is ``renormalize``, its
``symmetric_uniform`` is ``ghost``.  Residuals are not quantised, as in both of these settings.  Log-probs are read in
fp32 here, where DistillKit rounds them to bf16 once more: this is the method at its best.  It is written anew, as
DistillKit is in no package index.

Legend: N positions, K ids of each, T terms, P places on the curve (K without the exact ones).
Source   github.com/arcee-ai/DistillKit, README.md ("Logit Compression", "Recommended configuration")
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.recipes.policies import TopK
from shared.sparse import SparseTargets
from stage1_teacher.capturing.teacher import Teacher
from tests.benchmarks.peers.store import StoredMethod

SQUARE_ROOT = 0.5  # the term "sqrt", as a power


@dataclass(frozen=True)
class Polynomial(StoredMethod):
    """powers  of a place, one for each term

    Holds    log-probs that lie on such a curve come back as they were, up to fp32; ids always
    """

    k: int
    exact_k: int
    powers: tuple[float, ...]
    num_ids: int

    @classmethod
    def recommended(cls, num_ids: int) -> Polynomial:
        return cls(128, 16, (0, 1, 2, 3, 4, SQUARE_ROOT), num_ids)

    @classmethod
    def budget(cls, num_ids: int) -> Polynomial:
        return cls(50, 1, (0, 1, SQUARE_ROOT), num_ids)

    def columns(self, teacher: Teacher, hidden_ND: Tensor) -> dict[str, Tensor]:
        return self.compress(teacher.logprobs(hidden_ND))

    def compress(self, logprobs_NV: Tensor) -> dict[str, Tensor]:
        """exact (N, exact_k) bf16, coefficients (N, T) fp32, ids (N, bytes) uint8."""
        top_NK, ids_NK = logprobs_NV.topk(self.k)
        exact_NE, rest_NP = top_NK.split([self.exact_k, self.k - self.exact_k], dim=1)
        coefficients_NT = rest_NP.double() @ torch.linalg.pinv(self._terms()).t()
        return {
            "exact": exact_NE.bfloat16(),
            "coefficients": coefficients_NT.float(),
            "ids": pack(ids_NK, self._bits),
        }

    def decompress(self, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ids (N, K) int64 and log-probs (N, K) fp32, the likeliest first."""
        rest_NP = columns["coefficients"].double() @ self._terms().t()
        logprobs_NK = torch.cat([columns["exact"].float(), rest_NP.float()], 1)
        return unpack(columns["ids"], self._bits, self.k), logprobs_NK

    def targets(self, columns: dict[str, Tensor]) -> SparseTargets:
        ids_NK, logprobs_NK = self.decompress(columns)
        ids_NK, order_NK = ids_NK.sort(dim=1)
        num_positions = len(ids_NK)
        return SparseTargets(
            offsets=torch.arange(num_positions + 1) * self.k,
            ids=ids_NK.flatten().int(),
            logprobs=logprobs_NK.gather(1, order_NK).flatten(),
            policy=TopK(k=self.k),
            temperatures=(1.0,),
            log_normalizers=torch.zeros(num_positions, 0),
            entropy=torch.zeros(
                num_positions, 1
            ),  # that of the whole distribution; no loss of top_k asks for it
            draw_counts=torch.zeros(0, dtype=torch.int32),
        )

    @property
    def _bits(self) -> int:
        """Of an id."""
        return (self.num_ids - 1).bit_length()

    def _terms(self) -> Tensor:
        """(P, T) fp64."""
        places_P = torch.arange(self.k - self.exact_k, dtype=torch.float64)
        return torch.stack([places_P**power for power in self.powers], 1)


def pack(ids_NK: Tensor, num_bits: int) -> Tensor:
    """(N, bytes) uint8: so many bits of each id, one after the other, rows filled up with zeros."""
    bits = (ids_NK.numpy()[..., None] >> np.arange(num_bits)) & 1
    rows = bits.astype(np.uint8).reshape(len(ids_NK), -1)
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little"))


def unpack(packed: Tensor, num_bits: int, num_ids: int) -> Tensor:
    """So many ids (N, K) int64 of each row."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=num_ids * num_bits, bitorder="little")
    each = bits.reshape(len(packed), num_ids, num_bits).astype(np.int64)
    return torch.from_numpy((each << np.arange(num_bits)).sum(-1))
