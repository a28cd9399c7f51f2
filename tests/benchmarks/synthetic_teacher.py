"""A teacher's distributions over a large vocabulary, drawn: what ``bench_targets`` measures targets on.

Entropies: 60 % of positions under 0.5 nats, 30 % from there to 3, 10 % from there to 7, even in each range.
Ids: token v has the weight 1 / (v + 1), as tokenizers number frequent tokens first; the distribution is
softmax(beta * log(weight / e)), e exponential for each token and position, so that the order of a position's
tokens is a draw by Zipf's frequencies without replacement, and the probabilities fall with their rank as a
power, -beta, of it.  beta is solved for the entropy.

Context: e is a function of ``w_v . g_n``, w normal for each token and g the position's hidden state, as if the
teacher were a softmax over a hidden state: like contexts have like distributions.

Student: log q = log p + 0.75 b + 1.5 e, or with two other numbers, renormalised: a normal number b for each token,
tastes that are the same at every position, and a normal number e for each token and position.

Hidden states: a mean that all share, and the rest, g: unit vectors of all directions; see ``gradient_error``.

The size of g, the student's two numbers and the mean cosine are chosen so that errors are near those which the
design measured on a small language model (docs/targets.md has both).

Shapes: N positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NUM_EXACT, NUM_SAMPLED = 1024, 2048
HIDDEN_SIZE = 32


class Student(NamedTuple):
    """How far it is from the teacher: the factors of its tastes, and of what differs at each position."""

    taste: float = 0.75
    noise: float = 1.5


STUDENT = Student()


@dataclass(frozen=True)
class Positions:
    """A chunk of positions.

    Shapes   logprobs, student_logprobs (N, V) fp32; hidden (N, D) fp32, without the mean that all share
    """

    logprobs: Tensor
    student_logprobs: Tensor
    hidden: Tensor


def synthetic_positions(
    num_positions: int,
    *,
    vocab_size: int = 248_320,
    hidden_size: int = HIDDEN_SIZE,
    student: Student = STUDENT,
    seed: int = 0,
    chunk: int = 64,
) -> Iterator[Positions]:
    """The set, ``chunk`` positions at a time."""
    generator = torch.Generator().manual_seed(seed)
    log_weights = -torch.arange(1, vocab_size + 1).log()
    taste = student.taste * torch.randn(vocab_size, generator=generator)
    meaning_VD = torch.randn(vocab_size, hidden_size, generator=generator)
    for start in range(0, num_positions, chunk):
        size = min(chunk, num_positions - start)
        entropies = _draw_entropies(size, generator)
        hidden_ND = torch.nn.functional.normalize(torch.randn(size, hidden_size, generator=generator), dim=1)
        # -log of a uniform number is exponential, and the normal distribution's value at a normal number uniform.
        exponential = -torch.special.log_ndtr(hidden_ND @ meaning_VD.T)
        keys = log_weights - exponential.log_()
        keys -= keys.amax(-1, keepdim=True)
        logprobs = keys.mul_(_solve_beta(keys, entropies, generator)[:, None]).log_softmax(-1)
        its_logprobs = torch.randn(logprobs.shape, generator=generator).mul_(student.noise)
        its_logprobs = its_logprobs.add_(taste).add_(logprobs).log_softmax(-1)
        yield Positions(logprobs, its_logprobs, hidden_ND)


def _draw_entropies(size: int, generator: torch.Generator) -> Tensor:
    which, where = torch.rand(2, size, generator=generator)
    return torch.where(which < 0.6, 0.5 * where, torch.where(which < 0.9, 0.5 + 2.5 * where, 3 + 4 * where))


def _solve_beta(keys: Tensor, entropies: Tensor, generator: torch.Generator) -> Tensor:
    """The power that gives each position its entropy, by bisection.

    The largest keys count exactly, the others by a sample: fifty times faster, and 2 % off at most.
    """
    vocab_size = keys.shape[1]
    num_exact = min(NUM_EXACT, vocab_size)
    exact = keys.topk(num_exact).values
    sampled = keys[:, torch.randint(vocab_size, (NUM_SAMPLED,), generator=generator)]
    share = max(vocab_size - num_exact, 0) / (sampled < exact[:, -1:]).sum(-1, keepdim=True).clamp_min(1)
    log_counts = torch.where(sampled < exact[:, -1:], share.clamp_min(1e-30).log(), -torch.inf)
    log_counts = torch.cat([torch.zeros_like(exact), log_counts], 1)
    kept = torch.cat([exact, sampled], 1)
    low, high = torch.full((2, len(keys)), math.log(0.2))
    high = torch.full_like(high, math.log(200.0))
    for _ in range(25):
        middle = (low + high) / 2
        scaled = kept * middle.exp()[:, None]
        logprobs = scaled - (scaled + log_counts).logsumexp(-1, keepdim=True)
        is_flat = -((logprobs + log_counts).exp() * logprobs).sum(-1) > entropies
        low, high = torch.where(is_flat, middle, low), torch.where(is_flat, high, middle)
    return ((low + high) / 2).exp()
