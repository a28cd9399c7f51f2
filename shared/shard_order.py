"""A random order of a cache's examples that follows its shards: for caches larger than the disk they are staged on.

    layout = ShardLayout.of(shards)                          # the shard of each example
    order  = ShardOrder(layout, window=20, key=stream(42, epoch))
    order[np.arange(160, 176)]                               # examples

The shards come in a random order.  So many of them at a time make a window, and the examples of a window come in a
random order.  Whoever reads along needs the shards of one window at a time, and each of them once an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.permutation import Permutation, stream

WINDOW_SHARE = 0.4  # of the staging folder


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """Where examples lie.

    examples  (num_examples,) int64, shard after shard
    starts    (num_shards + 1,) int64: where each shard begins there; one without an example does not count
    """

    examples: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, shards: np.ndarray) -> ShardLayout:
        """Of (num_examples,) integers, the shard of each example."""
        sizes = np.unique(shards, return_counts=True)[1]
        return cls(np.argsort(shards, kind="stable"), np.append(0, np.cumsum(sizes)))

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1

    @property
    def fingerprint(self) -> str:
        """Hex.  Another layout is another order."""
        return hashlib.sha256(self.examples.tobytes() + self.starts.tobytes()).hexdigest()[:16]


def window_of(shard_bytes: Sequence[int], *, room: int) -> int:
    """How many shards to mix where so many bytes of them may lie on the disk at a time; 0: all of them fit.

    Two windows lie there together, when readers are at the end of one and others at the beginning of the next.
    """
    if sum(shard_bytes) <= room:
        return 0
    return max(1, int(WINDOW_SHARE * room) // max(shard_bytes))


class ShardOrder:
    """A permutation of the examples, one place at a time; a pure function of its arguments.

    window  shards whose examples are mixed
    key     64 bits, as ``stream`` makes them
    """

    def __init__(self, layout: ShardLayout, *, window: int, key: int) -> None:
        shards = Permutation(layout.num_shards, key=stream(key, 0))[np.arange(layout.num_shards)]
        sizes = np.diff(layout.starts)[shards]  # in the order in which they come
        self._layout, self._key = layout, key
        self._starts, self._ends = layout.starts[shards], np.cumsum(sizes)
        self._begins = self._ends - sizes
        last = np.minimum(np.arange(window, len(shards) + window, window), len(shards)) - 1
        self._window_ends = self._ends[last]

    def __len__(self) -> int:
        return len(self._layout.examples)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Shapes   places (N,), integers from 0 to the number of examples - 1; returns (N,) int64, examples

        Raises   IndexError  for a place outside
        """
        places = np.asarray(places, dtype=np.int64)
        if places.size and not (places.min() >= 0 and places.max() < len(self)):
            raise IndexError(f"places {places.min()} to {places.max()} of an order of {len(self)}")
        windows = np.searchsorted(self._window_ends, places, side="right")
        found = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            found[chosen] = self._of_window(int(window), places[chosen])
        return found

    def _of_window(self, window: int, places: np.ndarray) -> np.ndarray:
        begin = int(self._window_ends[window - 1]) if window else 0
        mixed = Permutation(int(self._window_ends[window]) - begin, key=stream(self._key, 1, window))
        places = begin + mixed[places - begin]
        shards = np.searchsorted(self._ends, places, side="right")
        return self._layout.examples[self._starts[shards] + places - self._begins[shards]]
