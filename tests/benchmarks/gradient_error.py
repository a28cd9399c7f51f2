"""The relative error of the head's gradient that a cache's targets cause.

The gradient of the distillation loss with respect to the head is ``sum_n h_n (x) (q_n - p_n)`` over positions, q the
student, p the teacher, h the student's hidden states.  With targets p^ for p the error is

    || sum_n h_n (x) (p^_n - p_n) ||_F  /  || sum_n h_n (x) (q_n - p_n) ||_F

Hidden states are ``sqrt(c) m + sqrt(1 - c) g_n``: unit vectors m, common to all, and g_n, isotropic and orthogonal to
m, so that c is the mean cosine of two positions' states.  Sums over m and over g_n are kept apart, and any c can be
looked at afterwards.

Shapes: N positions, V vocabulary, E entries, C columns of [1, g].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.recipes.policies import TopK
from shared.sparse import SparseTargets

MEAN_COSINE = 0.5
TAILS = ("ghost", "uniform", "renormalize", "drop")


@dataclass
class GradientError:
    """Sums of ``[1, g_n] (x) x_n`` over all positions so far, one for each kind of x."""

    vocab_size: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add_dense(self, name: str, features_NC: Tensor, values_NV: Tensor) -> None:
        self._sum(name, features_NC.shape[1]).addmm_(values_NV.T, features_NC)

    def add_entries(self, name: str, features_NC: Tensor, targets: SparseTargets, weights_E: Tensor) -> None:
        rows = features_NC[targets.position_index] * weights_E[:, None]
        self._sum(name, features_NC.shape[1]).index_add_(0, targets.ids.long(), rows)

    def add_tails(self, name: str, features_NC: Tensor, targets: SparseTargets, student_NV: Tensor) -> None:
        """Targets of ``top_k`` with each way of filling in the missing mass: sums ``name, mode``."""
        assert isinstance(targets.policy, TopK)
        position, weights_E = targets.position_index, targets.weights()
        # Ghost mass lies on the others only; what is left of one after the kept would be rounding.
        others_NV = student_NV.index_put((position, targets.ids.long()), torch.tensor(0.0))

        def total(values_E: Tensor) -> Tensor:
            return torch.zeros(len(features_NC)).index_add_(0, position, values_E)

        kept_N = total(weights_E)
        missing_N = (1 - kept_N).clamp_min(0)
        even_N = missing_N / (self.vocab_size - targets.policy.k)
        sparse = {
            "ghost": weights_E,
            "uniform": weights_E - even_N[position],
            "renormalize": weights_E / kept_N[position],
            "drop": weights_E,
        }
        for mode, values_E in sparse.items():
            self.add_entries(f"{name}, {mode}", features_NC, targets, values_E)
        ghost_N = missing_N / others_NV.sum(-1).clamp_min(1e-30)
        self.add_dense(f"{name}, ghost", features_NC * ghost_N[:, None], others_NV)
        self.add_dense(f"{name}, drop", features_NC * missing_N[:, None], student_NV)
        self._sum(f"{name}, uniform", features_NC.shape[1]).add_((features_NC * even_N[:, None]).sum(0))

    def relative(self, name: str, *, mean_cosine: float = MEAN_COSINE) -> float:
        """Of the targets whose sum is ``name``, teacher and student having been added as such."""
        teacher = self.sums["teacher"]
        error = _norm(self.sums[name] - teacher, mean_cosine)
        return error / _norm(self.sums["student"] - teacher, mean_cosine)

    def _sum(self, name: str, width: int) -> Tensor:
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.vocab_size, width)
        return self.sums[name]


def features(hidden_ND: Tensor) -> Tensor:
    """[1, g]."""
    return torch.cat([torch.ones(len(hidden_ND), 1), hidden_ND], 1)


def _norm(sum_VC: Tensor, mean_cosine: float) -> float:
    columns = torch.linalg.vector_norm(sum_VC, dim=0, dtype=torch.float64)
    common, rest = columns[0].item(), columns[1:].norm().item()
    return math.sqrt(mean_cosine * common**2 + (1 - mean_cosine) * rest**2)
