"""Entries of positions, a different number at each, as offsets into one run of entries.

N positions, E entries of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ragged:
    """What follows from offsets and ids.

    Shapes   offsets (N + 1,) int64: entries of position n are ``offsets[n]:offsets[n + 1]``; ids (E,) int32
    """

    offsets: Tensor
    ids: Tensor

    @property
    def num_positions(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> Tensor:
        """Entries of each position, (N,) int64."""
        return self.offsets.diff()

    @property
    def position_index(self) -> Tensor:
        """The position that each entry belongs to, (E,) int64."""
        return position_index(self.counts, self.num_entries)


def position_index(counts_N: Tensor, num_entries: int) -> Tensor:
    """The position of each entry, (E,) int64, on the counts' device, without waiting for it."""
    positions_N = torch.arange(len(counts_N), device=counts_N.device)
    return torch.repeat_interleave(positions_N, counts_N, output_size=num_entries)
