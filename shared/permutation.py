"""A random order of very many things, one place at a time: nothing is sorted, and nothing is kept in memory.

    order = Permutation(10_000_000_000, key=stream(42, epoch))
    order[np.arange(160, 176)]   # what comes at these places

A Feistel network over a rectangle: an index is a row and a column, and each round moves one of the two by a hash
of the other, which can be undone, so no two indices meet.  The rectangle has hardly more cells than there are
things; an index that comes out beyond them is sent through again until it comes out within ("cycle walking").

Source: Black, Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, methods 2 and 3.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

ROUNDS = 24  # small sets need many: with 12, orders of five things are visibly uneven


class Permutation:
    """Of ``range(size)``; a pure function of size and key, written in stone: runs that go on rely on it.

    size  1 to 2**62
    key   64 bits, as ``stream`` makes them
    """

    def __init__(self, size: int, *, key: int) -> None:
        if not 0 < size <= 2**62:
            raise ValueError(f"a permutation of {size} things: 1 to 2**62 needed")
        self.size = size
        self.num_rows = isqrt(size - 1) + 1
        self.num_columns = -(-size // self.num_rows)
        self._keys = mix(np.uint64(key) ^ mix(np.arange(ROUNDS, dtype=np.uint64)))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Shapes   places (N,), integers from 0 to size - 1; returns (N,) int64

        Raises   IndexError  for a place outside
        """
        found = np.array(places, dtype=np.int64)
        if found.size and not (found.min() >= 0 and found.max() < self.size):
            raise IndexError(f"places {found.min()} to {found.max()} of a permutation of {self.size}")
        walking = np.arange(found.size)
        while walking.size:
            found[walking] = self._once(found[walking])
            walking = walking[found[walking] >= self.size]
        return found

    def _once(self, index: np.ndarray) -> np.ndarray:
        row, column = np.divmod(index, self.num_columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                row = (row + _below(self.num_rows, mix(column.astype(np.uint64) ^ key))) % self.num_rows
            else:
                column = (
                    column + _below(self.num_columns, mix(row.astype(np.uint64) ^ key))
                ) % self.num_columns
        return row * self.num_columns + column


def stream(*numbers: int) -> int:
    """64 bits that depend on all of these numbers, in their order."""
    bits = np.uint64(0)
    for number in numbers:
        bits = mix(np.array([bits], dtype=np.uint64) ^ mix(np.array([number], dtype=np.uint64)))[0]
    return int(bits)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection of 64 bits.  Source: Steele, Lea, Flood, OOPSLA 2014, figure 16."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _below(bound: int, bits: np.ndarray) -> np.ndarray:
    return (bits % np.uint64(bound)).astype(np.int64)
