"""Reproducible draws from many distributions at once.

Every random number is a counter-based hash (splitmix64) of a position's seed, and the seed a hash of (cache
seed, example key, position): what is drawn does not depend on batch, chunk, order, rank, restart or device.

Shapes: N positions, V vocabulary, B blocks of a row, W tokens in a block.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_BLOCK_WIDTH = 256


def position_seeds(seed: int, key: bytes, num_positions: int) -> Tensor:
    """Seeds (N,) int64 of an example's positions: a pure function of cache seed, example key and position.

    Holds    the first seeds of a longer answer are those of a shorter one
    """
    digest = hashlib.blake2b(key, digest_size=8, key=(seed % (1 << 64)).to_bytes(8, "little")).digest()
    start = torch.full((num_positions,), struct.unpack("<q", digest)[0], dtype=torch.int64)
    return _hash(start, torch.arange(num_positions))


def uniforms(seeds: Tensor, counters: Tensor | int) -> Tensor:
    """Numbers in [0, 1), fp64, multiples of 2**-53: one for each pair of broadcast seeds and counters."""
    return _shift_right(_hash(seeds, counters), 11).double() * 2.0**-53


def substream(seeds: Tensor, counter: int) -> Tensor:
    """Seeds of another sequence for the same positions, independent of ``uniforms(seeds, ...)``."""
    return _hash(seeds, counter)


def _hash(seeds: Tensor, counters: Tensor | int) -> Tensor:
    """Output number ``counters`` of the splitmix64 generator whose state is ``seeds``; wraps like uint64."""
    if isinstance(counters, int):  # as a number: a tensor of it would be a copy that the host waits for
        mixed = seeds + _signed((counters + 1) * _GAMMA % (1 << 64))
    else:
        mixed = seeds + (counters + 1) * _GAMMA
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 tensors shift their sign in, which the mask takes away again."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class SamplePoints(Protocol):
    """The sample points of N positions, laid over each position's cumulative mass."""

    def count_below(self, edges: Tensor, totals: Tensor, positions: Tensor | None) -> Tensor:
        """How many points lie below each edge.

        Shapes   edges (R, C) fp64, rising cumulative masses; totals (N, 1), the positions' whole masses;
                 positions (R,): whose row each is, None when row n is of position n
        Returns  (R, C) int64
        """


class Systematic:
    """Points ``(u + i) * step`` for i = 0, 1, 2, ..., u in [0, 1): at most one on a mass below ``step``."""

    def __init__(self, offset_N: Tensor, *, step: float) -> None:
        self._offset_N1 = offset_N[:, None]
        self._step = step

    def count_below(self, edges: Tensor, totals: Tensor, positions: Tensor | None) -> Tensor:
        offset = self._offset_N1 if positions is None else self._offset_N1[positions]
        return torch.ceil(edges / self._step - offset).long()  # above -1, since u < 1


class Independent:
    """Any points, given in rising order as shares of a position's whole mass, in [0, 1)."""

    def __init__(self, share_NK: Tensor) -> None:
        self._share_NK = share_NK

    def count_below(self, edges: Tensor, totals: Tensor, positions: Tensor | None) -> Tensor:
        points = self._share_NK * totals
        points = points if positions is None else points[positions]
        return torch.searchsorted(points.contiguous(), edges.contiguous())


def draw(mass_NV: Tensor, points: SamplePoints) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens on which the points fall when every position's mass is laid out in the order of ids.

    Sums are fp64: in fp32 the cumulative mass over a quarter million tokens is off by more than a token.
    Blocks are summed first and only those that a point falls on are looked into, so that the mass is passed
    over once.

    Shapes   mass_NV (N, V) fp32, not negative, V a multiple of ``padded_width(1)``
    Returns  position, token id, number of points (E,) int64 each, ordered by position, then id
    Holds    every point below a position's total falls on exactly one token; on none without mass
    """
    mass_NBW = _blocks(mass_NV)
    upper_NB = mass_NBW.sum(-1, dtype=torch.float64).cumsum(-1)
    lower_NB = F.pad(upper_NB[:, :-1], (1, 0))
    total_N1 = upper_NB[:, -1:]
    below_upper_NB = points.count_below(upper_NB, total_N1, None)
    below_lower_NB = F.pad(below_upper_NB[:, :-1], (1, 0))
    position, block = (below_upper_NB > below_lower_NB).nonzero(as_tuple=True)

    edges = mass_NBW[position, block].double().cumsum(-1)
    # The last token with mass ends where its block ends, whatever the rounding: no point is lost.
    is_end = edges >= edges[:, -1:]
    edges = torch.where(is_end, upper_NB[position, block, None], edges + lower_NB[position, block, None])
    below = points.count_below(edges, total_N1, position)
    below_lower = below_lower_NB[position, block, None]
    below = torch.minimum(below.clamp_min_(below_lower), below_upper_NB[position, block, None])
    counts = below.diff(dim=-1, prepend=below_lower)
    row, within = counts.nonzero(as_tuple=True)
    return position[row], block[row] * _BLOCK_WIDTH + within, counts[row, within]


def padded_width(vocab_size: int) -> int:
    """The least width that holds a vocabulary in whole blocks."""
    return -(-vocab_size // _BLOCK_WIDTH) * _BLOCK_WIDTH


def row_sums(values_NV: Tensor) -> Tensor:
    """Sums (N,) fp64 over rows of whole blocks, always added in the same order.

    Blocks first, as ``draw`` has them: of one long row torch would give each thread a part, so that its sum
    depended on the rows beside it and on the number of threads.
    """
    return _blocks(values_NV).sum(-1).sum(-1, dtype=torch.float64)


def _blocks(values_NV: Tensor) -> Tensor:
    return values_NV.view(len(values_NV), values_NV.shape[1] // _BLOCK_WIDTH, _BLOCK_WIDTH)
