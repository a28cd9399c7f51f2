"""Several teachers' targets of the same positions, as one: their sum, each with its share.

    targets = mix([of_one, of_other], shares=[0.7, 0.3])

A weighted sum of unbiased targets is unbiased for the weighted mean of the distributions, whatever was drawn.

Shapes: N positions, E entries of the mixture, P entries of one of its parts, T temperatures that all parts have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from shared.errors import CacheMismatchError
from shared.sparse.ragged import Ragged
from shared.sparse.targets import SparseTargets, captured_temperatures


@dataclass(frozen=True, eq=False)
class MixedTargets(Ragged):
    """What the loss asks of targets, of several parts together.  Made by :func:`mix`.

    Entries are in one order: by position, then by ascending id; an id that several parts have comes once.

    Shapes   offsets (N + 1,) int64; ids (E,) int32; entry_of (P,) int64 for each part: where its entries went
    Units    shares sum to 1
    """

    offsets: Tensor
    ids: Tensor
    parts: tuple[SparseTargets, ...]
    shares: tuple[float, ...]
    entry_of: tuple[Tensor, ...]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those that all parts have."""
        others = [part.temperatures for part in self.parts[1:]]
        return tuple(t for t in self.parts[0].temperatures if all(t in one for one in others))

    @property
    def entropy(self) -> Tensor:
        """(N, T) fp32, nats: the mean of the teachers' own, by their shares; the mixture's is larger."""
        total_NT = self.parts[0].entropy.new_zeros(self.num_positions, len(self.temperatures))
        for part, share in zip(self.parts, self.shares, strict=True):
            places = [part.temperatures.index(t) for t in self.temperatures]
            total_NT += share * part.entropy[:, places]
        return total_NT

    def weights(self, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights of the entries as targets at a temperature, (E,) of ``dtype``, fp32 or wider.

        Raises   CacheMismatchError  for a temperature that a part does not have
        Holds    of sampled policies: E[sum_i w_i f(id_i)] = sum_v p(v) f(v), p the weighted mean of the teachers' p_T
        """
        if temperature not in self.temperatures:
            raise CacheMismatchError(captured_temperatures(temperature, self.temperatures))
        return self.gathered([part.weights(temperature, dtype) for part in self.parts])

    def gathered(self, values: Sequence[Tensor]) -> Tensor:
        """(E,), the parts' values (P,) of their entries, each times its share, added up at the mixture's entries."""
        total_E = values[0].new_zeros(self.num_entries)
        for values_P, share, entry_P in zip(values, self.shares, self.entry_of, strict=True):
            total_E.index_add_(0, entry_P, values_P * share)
        return total_E

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """Of each position the largest probability at temperature 1 by what was kept, and its id.

        Shapes   (N,) fp32; (N,) int64, the lowest of equals.  0 and -1 where nothing was kept
        """
        position_E = self.position_index
        probs_E = self.gathered([part.logprobs.float().exp() for part in self.parts])
        top_N = probs_E.new_zeros(self.num_positions)
        top_N.scatter_reduce_(0, position_E, probs_E, "amax")
        beyond = torch.iinfo(torch.int64).max
        ids_E = self.ids.long().where(probs_E == top_N[position_E], beyond)
        ids_N = torch.full_like(top_N, beyond, dtype=torch.int64)
        ids_N.scatter_reduce_(0, position_E, ids_E, "amin")
        return top_N, ids_N.where(top_N > 0, -1)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            offsets=function(self.offsets),
            ids=function(self.ids),
            parts=tuple(part.map(function) for part in self.parts),
            entry_of=tuple(map(function, self.entry_of)),
        )

    def slice(self, start: int, stop: int) -> Self:
        """Positions ``start:stop``; views where the entries are concerned."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        bounds = [part.offsets[[start, stop]].tolist() for part in self.parts]
        return replace(
            self,
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            parts=tuple(part.slice(start, stop) for part in self.parts),
            entry_of=tuple(
                entry_P[begin:end] - first
                for entry_P, (begin, end) in zip(self.entry_of, bounds, strict=True)
            ),
        )

    def select(self, index: Tensor) -> MixedTargets:
        """The positions of ``index`` (int64, any order, repeats allowed), in its order."""
        return mix([part.select(index) for part in self.parts], shares=self.shares)


def mix(parts: Sequence[SparseTargets], *, shares: Sequence[float]) -> MixedTargets:
    """The weighted sum of targets of the same positions.

    Raises   ValueError  for other numbers of positions or shares, or shares that are not above 0 and sum to 1
    """
    if len(parts) != len(shares) or len({part.num_positions for part in parts}) != 1:
        counts = [part.num_positions for part in parts]
        raise ValueError(f"targets of {counts} positions and {len(shares)} shares; all need the same")
    if not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {list(shares)} sum to {sum(shares):g}; they must be above 0 and sum to 1")
    placed = [(part.position_index << 32) | part.ids.long() for part in parts]
    union_E, inverse = torch.unique(torch.cat(placed), sorted=True, return_inverse=True)
    counts_N = torch.bincount(union_E >> 32, minlength=parts[0].num_positions)
    return MixedTargets(
        offsets=torch.nn.functional.pad(counts_N.cumsum(0), (1, 0)),
        ids=(union_E & 0xFFFFFFFF).int(),
        parts=tuple(parts),
        shares=tuple(share / sum(shares) for share in shares),
        entry_of=inverse.split([part.num_entries for part in parts]),
    )
