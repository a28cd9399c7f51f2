"""Divergences between a teacher p and a student q, as sums of terms of log p and log q.

Every divergence here is a sum over outcomes of ``term(log p, log q)``.  An outcome is a vocabulary id for a
dense teacher; for a truncated one it is a kept id, or the bucket of all others.  Each function gives the
terms and their derivative by log q (up to a multiple of q, which the softmax projects out), so that one
formula turns any of them into a gradient by the logits (docs/loss.md, "From terms to gradients").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import RecipeError

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and the teacher's share ``beta`` in the Jensen-Shannon mixture.

    forward_kl       KL(p || q)
    reverse_kl       KL(q || p)
    jensen_shannon   beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    total_variation  half the sum of |p - q|

    Raises   RecipeError  for an unknown name, or a beta outside (0, 1)
    Holds    all are zero for equal distributions and never negative
    Source   Agarwal et al., On-policy distillation of language models (2306.13649), for the mixture
    """

    kind: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise RecipeError(f"divergence {self.kind!r}: unknown; choose one of {', '.join(DIVERGENCES)}")
        if not 0.0 < self.beta < 1.0:
            raise RecipeError(f"divergence {self.kind}: beta is {self.beta}; it must lie between 0 and 1")

    def terms(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The summands and their derivatives by ``logq``, elementwise; a mass of zero adds no term of its own.

        Shapes   logp, logq  any equal shape and float dtype, nats; -inf is a mass of zero
        Holds    autograd through the summands gives the same gradient by logits, and no NaN for -inf
        """
        p, q = logp.exp(), logq.exp()
        if self.kind == "forward_kl":
            return _weighted(p, logp - logq), -p
        if self.kind == "reverse_kl":
            terms = _weighted(q, logq - logp)
            return terms, terms
        if self.kind == "total_variation":
            return (p - q).abs() / 2, torch.sign(q - p) * q / 2
        beta = self.beta
        log_mixture = _log_mixture(logp, logq, beta)
        of_student = (1 - beta) * _weighted(q, logq - log_mixture)
        return beta * _weighted(p, logp - log_mixture) + of_student, of_student


FORWARD_KL = Divergence()


def check_divergence(divergence: object) -> None:
    """Raises RecipeError for what is no ``Divergence``, as the name of one."""
    if not isinstance(divergence, Divergence):
        raise RecipeError(f"divergence is {divergence!r}; give a Divergence, as Divergence('reverse_kl')")


def _weighted(mass: Tensor, log_ratio: Tensor) -> Tensor:
    """mass * log_ratio, with 0 * inf = 0.  Both are masked: autograd multiplies the gradient of each by the other.

    NaN counts: it must not be hidden.
    """
    counts = mass != 0
    return torch.where(counts, mass, 0) * torch.where(counts, log_ratio, 0)


def _log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """log(beta * p + (1 - beta) * q), never -inf: from logs, as masses that just fit underflow times beta."""
    lowest = torch.finfo(logq.dtype).min / 4  # -inf would be NaN to logaddexp's gradient
    return torch.logaddexp(
        logp.clamp_min(lowest) + math.log(beta), logq.clamp_min(lowest) + math.log1p(-beta)
    )
