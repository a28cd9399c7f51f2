"""Slow, plain losses: one position after the other, dense vectors, autograd for gradients.

Imports nothing of the project; the tests compare the project's losses with these.
"""

from __future__ import annotations

import torch
from torch import Tensor

Entries = list[tuple[Tensor, Tensor]]  # ids and masses of each position


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return -torch.log(torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum())[label]


def log_softmax(logits: Tensor) -> Tensor:
    shifted = logits - logits.max()
    return shifted - torch.log(torch.exp(shifted).sum())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two vectors of masses, which need not be normalised."""
    held = p > 0
    return (p[held] * (torch.log(p[held]) - torch.log(q[held]))).sum()


def divergence(kind: str, p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jensen_shannon":
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    assert kind == "total_variation"
    return torch.abs(p - q).sum() / 2


def dense_kd(
    student: Tensor, teacher: Tensor, temperature: float, kind: str = "forward_kl", beta: float = 0.5
) -> Tensor:
    """Of one position, from the logits of both."""
    p, q = log_softmax(teacher / temperature).exp(), log_softmax(student / temperature).exp()
    return temperature**2 * divergence(kind, p, q, beta)


def sampled_kd(student: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, temperature: float) -> Tensor:
    """Soft cross-entropy with unbiased weights, minus the entropy of the whole teacher."""
    logq = log_softmax(student / temperature)
    total = -entropy.to(student.dtype)
    for index, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        total = total - weight * logq[index]
    return temperature**2 * total


def truncated_kd(
    student: Tensor,
    ids: Tensor,
    masses: Tensor,
    temperature: float,
    tail: str,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    num_vocab_ids: int | None = None,
) -> Tensor:
    """Divergence from the kept masses, completed as the tail mode says."""
    q = log_softmax(student / temperature).exp()
    masses, num_vocab_ids = masses.to(q.dtype), num_vocab_ids or len(q)
    is_kept = torch.zeros(len(q), dtype=torch.bool)
    is_kept[ids.long()] = True
    rest = 1 - masses.sum()
    if tail == "ghost":
        p, q = torch.cat([masses, rest[None]]), torch.cat([q[ids.long()], q[~is_kept].sum()[None]])
    else:
        p = torch.zeros_like(q).detach()
        p[ids.long()] = masses / masses.sum() if tail == "renormalize" else masses
        is_rest = ~is_kept & (torch.arange(len(q)) < num_vocab_ids)
        if tail == "uniform":
            p[is_rest] = rest / is_rest.sum()
    return temperature**2 * divergence(kind, p, q, beta)
