"""Targets of a teacher with another vocabulary: its entries, each at the student's id that its text begins with.

    targets = regroup(of_teacher, ids_S, is_shared_N, label_N)

Weights of entries that go to the same id are added up.  That is linear, so weights that are unbiased for the
teacher's distribution stay unbiased for the same distribution regrouped.  What ``ids_S`` should be is found by
``shared.other_vocabulary``; see docs/other-tokenizers.md.  A position of which the teacher says nothing has its label
for a target, so that labels alone are learned there, with their whole weight.

Shapes: N positions of the student, C of them the teacher's, S entries of these as the teacher has them, E entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from shared.sparse.mixture import MixedTargets
from shared.sparse.ragged import Ragged
from shared.sparse.targets import SparseTargets


@dataclass(frozen=True, eq=False)
class RegroupedTargets(Ragged):
    """What the loss asks of targets, over the student's ids.  Made by :func:`regroup`.

    Entries are in one order: by position, then by ascending id; no id comes twice at a position.  The total of a
    position's weights may be below one: entries whose text begins with no id of the student are left out.

    Shapes   offsets (N + 1,) int64; ids (E,) int32, of the student
             source: the teacher's targets of C positions
             is_shared_N (N,) bool: which positions are the teacher's, C of them, in order
             label_N (N,) int64: what is learned at the others
             is_label_E (E,) bool: which entries are such labels
             entry_of (S,) int64: where the source's entries went; E for those that are left out
    """

    offsets: Tensor
    ids: Tensor
    source: SparseTargets | MixedTargets
    is_shared_N: Tensor
    label_N: Tensor
    is_label_E: Tensor
    entry_of: Tensor

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The teacher's; its distribution is taken at a temperature first, and regrouped then."""
        return self.source.temperatures

    def weights(self, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights of the entries as targets at a temperature, (E,) of ``dtype``, fp32 or wider.

        Raises   CacheMismatchError  for a temperature that was not captured
        Holds    of sampled policies: E[sum_i w_i f(id_i)] = sum_v p_T(v) f(id of v), over the ids v that have one, at
                 the teacher's positions; one at the labels of the others
        """
        return self.gathered(self.source.weights(temperature, dtype))

    def gathered(self, values_S: Tensor) -> Tensor:
        """(E,), the values of the source's entries, added up where these went; one for labels."""
        total = values_S.new_zeros(self.num_entries + 1)  # the last one is for what is left out
        return total.index_add_(0, self.entry_of, values_S)[:-1] + self.is_label_E

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, source=self.source.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return replace(self._map(Tensor.pin_memory), source=self.source.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        names = ("offsets", "ids", "is_shared_N", "label_N", "is_label_E", "entry_of")
        changed = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)  # type: ignore[arg-type]  # all of them tensors

    def slice(self, start: int, stop: int) -> Self:
        """Positions ``start:stop``."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        before, until = (int(self.is_shared_N[:n].sum()) for n in (start, stop))
        begin, end = (int(self.source.offsets[n]) for n in (before, until))
        entry_of = self.entry_of[begin:end]
        is_left_out = entry_of == self.num_entries
        return replace(
            self,
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            source=self.source.slice(before, until),
            is_shared_N=self.is_shared_N[start:stop],
            label_N=self.label_N[start:stop],
            is_label_E=self.is_label_E[first:last],
            entry_of=torch.where(is_left_out, last, entry_of) - first,
        )

    def select(self, index: Tensor) -> RegroupedTargets:
        """The positions of ``index`` (int64, any order, repeats allowed), in its order."""
        is_shared = self.is_shared_N[index]
        rank_N = self.is_shared_N.cumsum(0) - 1
        chosen = rank_N[index[is_shared]]
        ids_S = torch.cat([self.ids.long(), self.ids.new_full((1,), -1)])[self.entry_of]
        counts = self.source.counts
        ids_of = ids_S.split(counts.tolist())
        picked = [ids_of[n] for n in chosen.tolist()]
        ids_of_chosen = torch.cat([ids_S[:0], *picked])
        return regroup(self.source.select(chosen), ids_of_chosen, is_shared, self.label_N[index])


def regroup(
    source: SparseTargets | MixedTargets, ids_S: Tensor, is_shared_N: Tensor, label_N: Tensor
) -> RegroupedTargets:
    """The source's entries at the student's ids.

    Shapes   source of C positions and S entries; ids_S (S,) int, below 0 for an entry that is left out
             is_shared_N (N,) bool, C of them true; label_N (N,) int64, the targets of the others
    """
    assert len(ids_S) == source.num_entries
    assert int(is_shared_N.sum()) == source.num_positions
    position_S = is_shared_N.nonzero().squeeze(1)[source.position_index]
    is_kept = ids_S >= 0
    of_labels = (~is_shared_N).nonzero().squeeze(1)
    placed_S = (position_S << 32) | ids_S.long()
    placed = torch.cat([placed_S[is_kept], (of_labels << 32) | label_N[of_labels]])
    union_E, inverse = torch.unique(placed, sorted=True, return_inverse=True)
    of_kept, of_label = inverse.split([len(placed) - len(of_labels), len(of_labels)])
    entry_of = torch.full_like(placed_S, len(union_E))
    entry_of[is_kept] = of_kept
    is_label_E = torch.zeros(len(union_E), dtype=torch.bool, device=union_E.device)
    is_label_E[of_label] = True
    counts_N = torch.bincount(union_E >> 32, minlength=len(is_shared_N))
    return RegroupedTargets(
        offsets=torch.nn.functional.pad(counts_N.cumsum(0), (1, 0)),
        ids=(union_E & 0xFFFFFFFF).int(),
        source=source,
        is_shared_N=is_shared_N,
        label_N=label_N,
        is_label_E=is_label_E,
        entry_of=entry_of,
    )
