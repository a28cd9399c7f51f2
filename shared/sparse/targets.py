"""Sparse targets: a ragged set of entries for a run of positions.

Shapes: N positions, E entries of all of them, T captured temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from shared.errors import CacheMismatchError
from shared.recipes.policies import Policy, Random, Threshold
from shared.sparse.ragged import Ragged, position_index


@dataclass(frozen=True, eq=False)
class SparseTargets(Ragged):
    """The entries of N positions, and what gives their weights at each captured temperature.

    Entries are in one order: by position, then by ascending id; no id comes twice at a position.

    Shapes   offsets (N + 1,) int64: entries of position n are ``offsets[n]:offsets[n + 1]``
             ids (E,) int32
             logprobs (E,) fp16, natural logs at temperature 1.  Where temperature 1 alone was captured by
             ``threshold`` they are the logs of the entries' *weights*: a kept token's log-prob, or
             ``policy.log_tau`` of a drawn one; by ``random`` at any one temperature ``log(count / draws)``
             log_normalizers (N, T') fp32: log sum_v p(v) ** (1 / t) for the captured t that are not 1
             entropy (N, T) fp32, nats, of the teacher's whole distribution at each captured temperature
             draw_counts (E,) int32: how often ``random`` drew each entry; empty (0,) for other policies
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    policy: Policy
    temperatures: tuple[float, ...]
    log_normalizers: Tensor
    entropy: Tensor
    draw_counts: Tensor

    def __post_init__(self) -> None:
        assert self.ids.shape == self.logprobs.shape
        assert len(self.log_normalizers) == len(self.entropy) == self.num_positions
        assert self.entropy.shape[1] == len(self.temperatures)
        assert len(self.draw_counts) == (self.num_entries if isinstance(self.policy, Random) else 0)

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """Of each position the largest probability that was kept at temperature 1, and its id.

        Shapes   (N,) fp32; (N,) int64, the lowest of equals.  0 and -1 where nothing was kept
        """
        position_E, logprobs_E = self.position_index, self.logprobs.float()
        top_N = logprobs_E.new_full((self.num_positions,), -math.inf)
        top_N.scatter_reduce_(0, position_E, logprobs_E, "amax")
        beyond = torch.iinfo(torch.int64).max
        ids_E = self.ids.long().where(logprobs_E == top_N[position_E], beyond)
        ids_N = torch.full_like(top_N, beyond, dtype=torch.int64)
        ids_N.scatter_reduce_(0, position_E, ids_E, "amin")
        return top_N.exp(), ids_N.where(top_N > -math.inf, -1)

    def weights(self, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights of the entries as targets at a captured temperature, (E,) of ``dtype``, fp32 or wider.

        Raises   CacheMismatchError  for a temperature that was not captured
        Holds    sampled policies: E[sum_i w_i f(id_i)] = sum_v p_T(v) f(v) for every f, exactly at temperature
                 1 alone, else as docs/targets.md says ("Several temperatures");
                 ``random`` at its only temperature: they sum to one at each position;
                 deterministic policies: the kept probabilities themselves
        Source   derived in docs/targets.md
        """
        if temperature not in self.temperatures:
            raise CacheMismatchError(captured_temperatures(temperature, self.temperatures))
        if isinstance(self.policy, Random):
            share = self.draw_counts.to(dtype) / self.policy.draws
            if len(self.temperatures) == 1:
                return share
            return share * random_log_ratio(self._tempered(dtype), self._place(temperature)).exp()
        if not isinstance(self.policy, Threshold):
            return self.log_masses(temperature, dtype).exp()
        if self.temperatures == (1.0,):
            return self.logprobs.to(dtype).exp()
        logprobs_TE = self._tempered(dtype)
        log_kept = threshold_log_inclusion(logprobs_TE, self.policy)
        return (logprobs_TE[self._place(temperature)] - log_kept).exp()

    def log_masses(self, temperature: float, dtype: torch.dtype) -> Tensor:
        """Logs (E,) of the weights of a deterministic policy, also of those that underflow."""
        assert not self.policy.is_sampled
        return self._tempered(dtype)[self._place(temperature)]

    def _place(self, temperature: float) -> int:
        return self.temperatures.index(temperature)

    def _tempered(self, dtype: torch.dtype) -> Tensor:
        """The entries' log-probs (T, E) at each captured temperature."""
        normalizers = self.log_normalizers.to(dtype)[self.position_index]
        return tempered_logprobs(self.logprobs.to(dtype), normalizers, self.temperatures)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With each tensor as the function has it."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update({name: function(v) for name, v in values.items() if isinstance(v, Tensor)})
        return replace(self, **values)

    def slice(self, start: int, stop: int) -> Self:
        """Positions ``start:stop``; views where the entries are concerned."""
        assert 0 <= start <= stop <= self.num_positions
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return replace(
            self,
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            logprobs=self.logprobs[first:last],
            log_normalizers=self.log_normalizers[start:stop],
            entropy=self.entropy[start:stop],
            draw_counts=self.draw_counts[first:last],
        )

    def select(self, index: Tensor) -> Self:
        """The positions of ``index`` (int64, any order, repeats allowed), in its order."""
        counts = self.counts[index]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        num_entries = int(offsets[-1])
        shift = self.offsets[index] - offsets[:-1]
        entries = torch.arange(num_entries, device=index.device)
        entries += shift[position_index(counts, num_entries)]
        return replace(
            self,
            offsets=offsets,
            ids=self.ids[entries],
            logprobs=self.logprobs[entries],
            log_normalizers=self.log_normalizers[index],
            entropy=self.entropy[index],
            draw_counts=self.draw_counts[entries] if len(self.draw_counts) else self.draw_counts,
        )

    @staticmethod
    def concat(parts: Sequence[SparseTargets]) -> SparseTargets:
        """One after the other; all of one policy, the same temperatures and device."""
        first = parts[0]
        assert all(p.policy == first.policy and p.temperatures == first.temperatures for p in parts)
        counts = torch.cat([part.counts for part in parts])
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("ids", "logprobs", "log_normalizers", "entropy", "draw_counts")
        }
        return replace(first, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)), **joined)


def captured_temperatures(asked: float, captured: Sequence[float]) -> str:
    """What to say of a temperature that targets do not serve."""
    return (
        f"temperature {asked:g} was not captured: these targets serve {', '.join(f'{t:g}' for t in captured)}. "
        "Use one of those, or capture again with it in cache.temperatures"
    )


def tempered_logprobs(logprobs: Tensor, log_normalizers: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Log-probs (T, E) at each temperature, of those (E,) at 1 and of the other ones' log Z (E, T')."""
    others = iter(log_normalizers.unbind(1))
    return torch.stack([logprobs if t == 1.0 else logprobs / t - next(others) for t in temperatures])


def threshold_log_inclusion(logprobs_TE: Tensor, policy: Threshold) -> Tensor:
    """The log of the probability (E,) with which ``threshold`` keeps entries of these log-probs.

    Capture and weights both have it from here: weights are unbiased because they divide by what was used.
    """
    return (logprobs_TE.amax(0) - policy.log_tau).clamp_max(0)


def random_log_ratio(logprobs_TE: Tensor, place: int) -> Tensor:
    """Log (E,) of the probability at one temperature over the mean of all, from which ``random`` draws."""
    proposal = logprobs_TE.logsumexp(0) - math.log(len(logprobs_TE))
    return logprobs_TE[place] - proposal


def share_logprobs(draw_counts: Tensor, policy: Random) -> Tensor:
    """Logs (E,) fp16 of the shares of draws: what ``random`` has for log-probs at its only temperature."""
    return (draw_counts.double() / policy.draws).log().half()
