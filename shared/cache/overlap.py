"""Which keys several caches share: their sorted indices are gone through together, a range of keys at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache.format import KEY_BYTES, KEY_DTYPE
from shared.cache.index import CacheIndex

KEYS_AT_ONCE = 1 << 20  # of all caches together


@dataclass(frozen=True)
class Overlap:
    """Keys that several caches hold.

    num_keys  such keys, each counted once
    pairs     how many of them each two caches share, of neighbours among those that hold one; and one of the keys
    """

    num_keys: int
    pairs: dict[tuple[int, int], tuple[int, bytes]]

    @property
    def num_shadowed(self) -> int:
        """Rows that an earlier cache holds as well."""
        return sum(number for number, _ in self.pairs.values())

    @classmethod
    def of(cls, indices: Sequence[CacheIndex]) -> Overlap:
        num_keys, counts, first = 0, Counter[tuple[int, int]](), dict[tuple[int, int], bytes]()
        for keys, owners in key_ranges(indices):
            is_again = keys[1:] == keys[:-1]
            num_keys += int((is_again & ~np.append(False, is_again[:-1])).sum()) if len(is_again) else 0
            places = np.flatnonzero(is_again)
            pairs = list(zip(owners[places].tolist(), owners[places + 1].tolist(), strict=True))
            counts.update(pairs)
            for pair, place in zip(pairs, places.tolist(), strict=True):
                first.setdefault(pair, keys[place : place + 1].tobytes())
        return cls(num_keys, {pair: (counts[pair], first[pair]) for pair in sorted(counts)})


def key_ranges(
    indices: Sequence[CacheIndex],
) -> Iterator[tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]]:
    """All keys in order, one range of all possible ones at a time, and the number of each one's cache.

    Equal keys stand together, in the order of their caches.
    """
    tables = [part.keys for index in indices for part in index.parts]
    owner_of = np.repeat(np.arange(len(indices)), [len(index.parts) for index in indices])
    num_ranges = max(1, -(-sum(map(len, tables)) // KEYS_AT_ONCE))
    edges = [((number << 8 * KEY_BYTES) // num_ranges).to_bytes(KEY_BYTES) for number in range(1, num_ranges)]
    begins = [0] * len(tables)
    for edge in [*edges, None]:
        ends = [_before(edge, keys) for keys in tables]
        spans = [keys[begin:end] for keys, begin, end in zip(tables, begins, ends, strict=True)]
        keys = np.concatenate([np.empty(0, KEY_DTYPE), *spans])
        order = np.argsort(keys, kind="stable")
        yield keys[order], np.repeat(owner_of, [len(span) for span in spans])[order]
        begins = ends


def _before(edge: bytes | None, keys: npt.NDArray[np.bytes_]) -> int:
    """How many of the sorted keys come before the edge; all, where there is none."""
    return len(keys) if edge is None else int(np.searchsorted(keys, np.frombuffer(edge, KEY_DTYPE))[0])
