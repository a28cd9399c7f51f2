"""From dense log-probs to sparse targets, one function a policy.

Shapes: N positions, V vocabulary, E entries of all positions, T captured temperatures, K a policy's bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import DataError, RecipeError
from shared.recipes.policies import Policy, Random, Threshold, TopK, TopP
from shared.sparse.draws import Independent, Systematic, draw, padded_width, row_sums, substream, uniforms
from shared.sparse.grid import grid_on, has_floor, round_unbiased, share_of_mass, share_of_mean
from shared.sparse.targets import (
    SparseTargets,
    random_log_ratio,
    share_logprobs,
    tempered_logprobs,
    threshold_log_inclusion,
)

# Positions are worked on in groups of so many log-probs.  On a CPU the temporaries then stay in its cache (a
# third of the time that large groups took); elsewhere they stay below 1 GiB.
_MAX_GROUP_ELEMENTS = {"cpu": 1 << 21}
_MAX_GROUP_ELEMENTS_ELSEWHERE = 1 << 25
_LOWEST_FP16 = -65504.0
_MOST_RAISED = 80.0  # an exponent that fp32 holds; what a wider gap would raise has no mass


def sampling_version(policy: Policy, temperatures: tuple[float, ...]) -> Literal[1, 2]:
    """Which way of drawing ``sparsify`` has for these; a part of a cache's identity, so that none are mixed.

    1  at temperature 1 alone, of ``random`` at any one, and of policies that draw nothing: as ever
    2  where log-probs are stored beside draws: inclusion and rounding as docs/targets.md has them; until 2
       inclusion was taken before rounding, and ``random`` rounded to the nearest
    """
    stores_both = isinstance(policy, Threshold) and temperatures != (1.0,)
    return 2 if stores_both or (isinstance(policy, Random) and len(temperatures) > 1) else 1


def sparsify(
    logprobs_NV: Tensor,
    policy: Policy,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    seeds: Tensor,
) -> SparseTargets:
    """What ``policy`` keeps of each position's distribution.

    Shapes   logprobs_NV (N, V) fp32, natural logs at temperature 1, normalised over V; -inf where there is
             no mass, as for a head's padding ids: such tokens are never kept
             seeds (N,) int64 of ``position_seeds``, on the same device
             a graph of the log-probs is not followed
    Returns  SparseTargets on that device
    Raises   DataError    for NaN, infinity, or rows whose probabilities do not sum to one
             RecipeError  for temperatures that are not different positive numbers
             ValueError   for seeds of another number of positions
    Holds    all that is kept of a position depends on its log-probs and seed alone, bit for bit: not on the
             positions beside it, strides, or (on a CPU) the number of threads; other devices round differently
    Source   docs/targets.md
    """
    _check_temperatures(temperatures)
    num_positions, vocab_size = logprobs_NV.shape
    if seeds.shape != (num_positions,):
        raise ValueError(
            f"seeds of the shape {list(seeds.shape)} for log-probs of {num_positions} positions; give one for each"
        )
    logprobs_NV = logprobs_NV.detach()
    assert vocab_size > 0
    max_elements = _MAX_GROUP_ELEMENTS.get(logprobs_NV.device.type, _MAX_GROUP_ELEMENTS_ELSEWHERE)
    step = max(1, max_elements // vocab_size)
    parts = [
        _sparsify_group(
            logprobs_NV[start : start + step], policy, tuple(temperatures), seeds[start : start + step], start
        )
        for start in range(0, max(num_positions, 1), step)
    ]
    return SparseTargets.concat(parts) if len(parts) > 1 else parts[0]


def _check_temperatures(temperatures: tuple[float, ...]) -> None:
    sound = all(math.isfinite(t) and t > 0 for t in temperatures)
    if not temperatures or not sound or len(set(temperatures)) != len(temperatures):
        raise RecipeError(
            f"cache.temperatures {list(temperatures)}: give one or more different positive numbers"
        )


@dataclass
class _Kept:
    """Entries of a group, in any order."""

    position: Tensor
    ids: Tensor
    logprobs: Tensor  # fp16
    draw_counts: Tensor | None = None


@dataclass
class _Tempered:
    """A group's distributions at one temperature."""

    logprobs: Tensor  # (N, V)
    probs: Tensor  # (N, V), widened with zeros to whole blocks of ``draw``
    log_normalizer: Tensor  # (N,)


def _sparsify_group(
    logprobs_NV: Tensor, policy: Policy, temperatures: tuple[float, ...], seeds_N: Tensor, first_position: int
) -> SparseTargets:
    logprobs_NV = logprobs_NV.float().contiguous()  # sums over other strides are added in another order
    tempered = [_temper(logprobs_NV, temperature) for temperature in temperatures]
    _check_normalised(logprobs_NV, tempered, temperatures, first_position)
    entropy_NT = torch.stack([_entropy(t) for t in tempered], 1)
    others = [t.log_normalizer for t, value in zip(tempered, temperatures, strict=True) if value != 1.0]
    normalizers = torch.stack(others, 1) if others else logprobs_NV.new_zeros(len(logprobs_NV), 0)
    match policy:
        case Threshold() if has_floor(policy, temperatures):
            kept = _threshold(logprobs_NV, tempered[0].probs, policy, seeds_N)
        case Threshold():
            kept = _threshold_at_several(logprobs_NV, tempered, policy, temperatures, normalizers, seeds_N)
        case Random():
            kept = _random(logprobs_NV, tempered, policy, temperatures, normalizers, seeds_N)
        case TopK():
            kept = _top_k(logprobs_NV, policy)
        case TopP():
            kept = _top_p(logprobs_NV, policy)
    order = ((kept.position << 32) | kept.ids).argsort()
    num_positions = len(logprobs_NV)
    counts = torch.bincount(kept.position, minlength=num_positions)
    empty = torch.zeros(0, dtype=torch.int32, device=logprobs_NV.device)
    return SparseTargets(
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        ids=kept.ids[order].int(),
        logprobs=kept.logprobs[order],
        policy=policy,
        temperatures=temperatures,
        log_normalizers=normalizers,
        entropy=entropy_NT,
        draw_counts=empty if kept.draw_counts is None else kept.draw_counts[order].int(),
    )


def _temper(logprobs_NV: Tensor, temperature: float) -> _Tempered:
    num_positions, vocab_size = logprobs_NV.shape
    log_normalizer_N = logprobs_NV.new_zeros(num_positions)
    probs_NV = logprobs_NV.new_empty(num_positions, padded_width(vocab_size))
    probs_NV[:, vocab_size:] = 0
    if temperature != 1.0:
        logprobs_NV = logprobs_NV / temperature
        largest_N = logprobs_NV.amax(-1)
        logprobs_NV -= largest_N[:, None]
    torch.exp(logprobs_NV, out=probs_NV[:, :vocab_size])
    if temperature != 1.0:
        total_N = row_sums(probs_NV).float()
        log_normalizer_N = largest_N + total_N.log()
        logprobs_NV -= total_N.log()[:, None]
        probs_NV /= total_N[:, None]
    return _Tempered(logprobs_NV, probs_NV, log_normalizer_N)


def _check_normalised(
    logprobs_NV: Tensor, tempered: list[_Tempered], temperatures: tuple[float, ...], first_position: int
) -> None:
    captured = dict(zip(temperatures, tempered, strict=True))
    probs_NV = captured[1.0].probs if 1.0 in captured else logprobs_NV.exp()
    total_N = probs_NV.sum(-1)
    wrong = ((total_N - 1).abs() < 1e-3).logical_not()  # NaN compares false
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise DataError(
            f"log-probs of position {first_position + index}: probabilities that sum to "
            f"{float(total_N[index]):g} found, to 1 needed; the teacher gave NaN or infinity, or these were "
            "not normalised in fp32"
        )


def _entropy(tempered: _Tempered) -> Tensor:
    # A third of the time that torch.special.entr takes, which computes the logs again.
    vocab_size = tempered.logprobs.shape[1]
    terms_NV = torch.empty_like(tempered.probs)
    torch.clamp_min(tempered.logprobs, -1e4, out=terms_NV[:, :vocab_size])
    terms_NV[:, vocab_size:] = 0
    return (0.0 - row_sums(terms_NV.mul_(tempered.probs))).float()  # a certain teacher's is 0.0, not -0.0


def _threshold(logprobs_NV: Tensor, mass_NV: Tensor, policy: Threshold, seeds_N: Tensor) -> _Kept:
    """Each token with probability ``min(1, p / tau)``: the certain ones, and a draw from the rest."""
    is_certain_NV = logprobs_NV >= policy.log_tau
    position, ids, num_certain, _ = _certain_and_drawn(mass_NV, is_certain_NV, policy, seeds_N)
    logprobs = logprobs_NV[position, ids]
    logprobs[num_certain:] = policy.log_tau
    chance = _chance(seeds_N, 1, position, ids)
    return _Kept(position, ids, round_unbiased(logprobs, chance, grid_on(policy, (1.0,), logprobs.device)))


def _threshold_at_several(
    logprobs_NV: Tensor,
    tempered: list[_Tempered],
    policy: Threshold,
    temperatures: tuple[float, ...],
    normalizers_NT: Tensor,
    seeds_N: Tensor,
) -> _Kept:
    """Each token with the probability ``min(1, max_T p_T / tau)`` of its *rounded* log-prob.

    Weights divide by what rounding leaves, so inclusion must have it too.  To round a whole vocabulary costs
    more than the draw: so tokens are drawn with the most that rounding can make of them, the drawn ones are
    rounded, and of these some are given up again, by what rounding did make of them.
    """
    mass_NV = _most_mass(logprobs_NV, tempered, temperatures)
    is_certain_NV = mass_NV[:, : logprobs_NV.shape[1]] >= math.exp(policy.log_tau)
    position, ids, _, chosen = _certain_and_drawn(mass_NV, is_certain_NV, policy, seeds_N)

    share = share_of_mass(1.0 if 1.0 in temperatures else temperatures[0])
    exact = logprobs_NV[position, ids].clamp_min_(_LOWEST_FP16)
    chance = _chance(seeds_N, 1, position, ids)
    stored = round_unbiased(exact, chance, grid_on(policy, temperatures, exact.device), share=share)
    logprobs_TE = tempered_logprobs(stored.float(), normalizers_NT[position], temperatures)
    included = threshold_log_inclusion(logprobs_TE, policy).double().exp()
    is_kept = _chance(seeds_N, 2, position, ids) * chosen < included
    return _Kept(position[is_kept], ids[is_kept], stored[is_kept])


def _most_mass(logprobs_NV: Tensor, tempered: list[_Tempered], temperatures: tuple[float, ...]) -> Tensor:
    """The most that ``max_T p_T`` can be after rounding to fp16, widened with zeros like ``probs``."""
    gap_NV = logprobs_NV.abs() * 2.0**-10 + 2.0**-24  # no less than from one fp16 number to the next
    mass_NV = torch.zeros_like(tempered[0].probs)
    most_NV = mass_NV[:, : logprobs_NV.shape[1]]
    for temperature, at in zip(temperatures, tempered, strict=True):
        raised_NV = (gap_NV / temperature).clamp_max_(_MOST_RAISED).exp_()
        torch.maximum(most_NV, raised_NV.mul_(at.probs[:, : most_NV.shape[1]]), out=most_NV)
    return mass_NV.mul_(1 + 1e-5)  # for the fp32 of what is compared with it


def _certain_and_drawn(
    mass_NV: Tensor, is_certain_NV: Tensor, policy: Threshold, seeds_N: Tensor
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Tokens that are kept for certain, then those drawn from the others' mass, in steps of tau.

    Returns  position, id (E,); how many are certain; with which probability each was chosen, (E,) fp64
    """
    step = math.exp(policy.log_tau)
    mass_NV[:, : is_certain_NV.shape[1]].masked_fill_(is_certain_NV, 0.0)
    certain_position, certain_ids = is_certain_NV.nonzero(as_tuple=True)
    drawn_position, drawn_ids, _ = draw(mass_NV, Systematic(uniforms(seeds_N, 0), step=step))
    drawn_mass = mass_NV[drawn_position, drawn_ids].double() / step
    chosen = torch.cat([torch.ones_like(certain_ids, dtype=torch.float64), drawn_mass])
    position, ids = torch.cat([certain_position, drawn_position]), torch.cat([certain_ids, drawn_ids])
    return position, ids, len(certain_ids), chosen


def _chance(seeds_N: Tensor, sequence: int, position: Tensor, ids: Tensor) -> Tensor:
    """A token's own uniform number in one of a position's further sequences, (E,) fp64."""
    return uniforms(substream(seeds_N, sequence)[position], ids)


def _random(
    logprobs_NV: Tensor,
    tempered: list[_Tempered],
    policy: Random,
    temperatures: tuple[float, ...],
    normalizers_NT: Tensor,
    seeds_N: Tensor,
) -> _Kept:
    """``draws`` independent tokens of the mean of the captured temperatures' distributions."""
    mass_NV = tempered[0].probs
    for other in tempered[1:]:
        mass_NV = mass_NV + other.probs
    counters = torch.arange(policy.draws, device=seeds_N.device)
    points_NK = uniforms(seeds_N[:, None], counters).sort(-1).values
    position, ids, draw_counts = draw(mass_NV, Independent(points_NK))
    if len(tempered) == 1:
        return _Kept(position, ids, share_logprobs(draw_counts, policy), draw_counts)

    coldest = temperatures.index(min(temperatures))  # its ratio to the mean only rises with the log-prob

    def ratio(logprobs: Tensor) -> Tensor:
        normalizers = normalizers_NT[position].double()
        return random_log_ratio(
            tempered_logprobs(logprobs.double(), normalizers, temperatures), coldest
        ).exp()

    exact = logprobs_NV[position, ids].clamp_min_(_LOWEST_FP16)
    chance = _chance(seeds_N, 1, position, ids)
    grid = grid_on(policy, temperatures, exact.device)
    return _Kept(position, ids, round_unbiased(exact, chance, grid, share=share_of_mean(ratio)), draw_counts)


def _top_k(logprobs_NV: Tensor, policy: TopK) -> _Kept:
    top_NK, ids_NK = logprobs_NV.topk(min(policy.k, logprobs_NV.shape[1]), sorted=False)
    return _kept_where(top_NK > -torch.inf, top_NK, ids_NK)


def _top_p(logprobs_NV: Tensor, policy: TopP) -> _Kept:
    top_NK, ids_NK = logprobs_NV.topk(min(policy.max_k, logprobs_NV.shape[1]))
    probs_NK = top_NK.exp()
    before_NK = F.pad(probs_NK[:, :-1].cumsum(-1, dtype=torch.float64), (1, 0))
    return _kept_where((before_NK < policy.p) & (top_NK > -torch.inf), top_NK, ids_NK)


def _kept_where(mask_NK: Tensor, logprobs_NK: Tensor, ids_NK: Tensor) -> _Kept:
    position, column = mask_NK.nonzero(as_tuple=True)
    return _Kept(position, ids_NK[position, column], _nearest_fp16(logprobs_NK[position, column]))


def _nearest_fp16(logprobs: Tensor) -> Tensor:
    return logprobs.clamp_min(_LOWEST_FP16).half() + 0.0  # which makes one zero of two
