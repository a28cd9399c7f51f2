"""Caches of different rows, asked as one is.

    cache = CacheList(["caches/monday", "s3://bucket/tuesday"])
    rows = cache.rows(keys)

Nothing is copied.  A place in a cache has 32 bits; places of several are never added up, but shards are numbered
over all of them, in 64 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from shared.cache.format import sha256_hex
from shared.cache.gains import gains_of
from shared.cache.index import Keys, as_key_array, split_keys
from shared.cache.overlap import Overlap
from shared.cache.shard import Row
from shared.cache.staging import Staging
from shared.cache.together import Together, digest_of, require_none
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import VisualGain
from shared.sparse import SparseTargets


class CacheList(Together):
    """Caches of different rows: later captures, other machines' parts, other teachers' rows.

    duplicates  of a row that several hold: ``refuse``, or take the ``first`` one's
    teachers    ``one``, or ``many``: the caches may be of different teachers

    Raises   CacheMismatchError  when they were not captured alike, or hold a row twice
             CacheFormatError    as a CacheReader does
    Holds    all that it gives equals, bit for bit, what ``merge`` of these caches gives
    """

    kind = "caches"
    same_rows = False
    remedy = (
        "Caches of a list must be captured alike (cache.teachers: many allows different teachers). Leave one out, or "
        "capture its rows again."
    )

    def __init__(
        self,
        locations: Sequence[str],
        *,
        duplicates: Literal["refuse", "first"] = "refuse",
        teachers: Literal["one", "many"] = "one",
        staging: Staging | None = None,
    ) -> None:
        self.many_teachers = teachers == "many"
        super().__init__(locations, staging)
        overlap = Overlap.of([part.index for part in self.parts])
        if overlap.num_keys and duplicates == "refuse":
            raise CacheMismatchError(self._told(overlap))
        self.num_in_several, self._num_shadowed = overlap.num_keys, overlap.num_shadowed
        self._first_shards = np.cumsum([0, *(part.num_shards for part in self.parts)], dtype=np.int64)

    def _told(self, overlap: Overlap) -> str:
        lines = [
            f"  - {number:,} in {self.parts[one].location} and in {self.parts[other].location}, key {key.hex()} first"
            for (one, other), (number, key) in overlap.pairs.items()
        ]
        return "\n".join(
            [
                f"{self.where}: {overlap.num_keys:,} example(s) are in more than one of them:",
                *lines,
                "Leave a cache out, or set cache.duplicates to first: the first that has such a row then gives it.",
            ]
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts)) - self._num_shadowed

    @cached_property
    def fingerprint(self) -> str:
        """Hex, of what they hold, in their order."""
        return digest_of("list", [part.fingerprint for part in self.parts])

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Why rows are in none of them, by the key in hex."""
        found = {key: reason for part in reversed(self.parts) for key, reason in part.skipped.items()}
        held = self.contains([bytes.fromhex(key) for key in found])
        return {key: reason for (key, reason), has in zip(found.items(), held, strict=True) if not has}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of each cache's teacher; different ones of one name are told apart by their weights."""
        known: dict[str, str] = {}  # by weights: the same under another name is no other teacher
        for part in self.parts:
            teacher = part.manifest.identity.teacher
            known.setdefault(teacher.weights_fingerprint, teacher.label)
        times = Counter(known.values())
        called = {
            weights: label if times[label] == 1 else f"{label} (weights {weights[:12]})"
            for weights, label in known.items()
        }
        return tuple(called[part.manifest.identity.teacher.weights_fingerprint] for part in self.parts)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._names))

    def teachers(self, keys: Keys) -> list[str]:
        """Of the rows of these keys, the name of each one's teacher.  Raises as :meth:`read` does."""
        return [self._names[owner] for owner in self._owners(keys, ()).tolist()]

    def teachers_digest(self, keys: Keys) -> str:
        """Whose targets these rows have: the weights' fingerprint of their teacher, or a digest over those of all."""
        weights = [part.manifest.identity.teacher.weights_fingerprint for part in self.parts]
        known = sorted(set(weights))
        if len(known) == 1:
            return known[0]
        taught = np.array([known.index(one) for one in weights])[self._owners(keys, ())]
        used, taught = np.unique(taught, return_inverse=True)
        names = [known[number] for number in used.tolist()]
        return names[0] if len(names) == 1 else digest_of(names, sha256_hex(taught.astype("<u4").tobytes()))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(len(keys),) bool."""
        return self._find(keys) >= 0

    def lacking(self, keys: Keys) -> list[tuple[CacheList, npt.NDArray[np.int64]]]:
        """Itself and the places of the keys that are in none of the caches; empty where there are none."""
        places = np.flatnonzero(~self.contains(keys))
        return [(self, places)] if len(places) else []

    def num_positions(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),) int64, from the indices alone.  Raises as :meth:`read` does."""
        found = np.empty(len(keys), dtype=np.int64)
        for owner, places, own in self._by_owner(keys, names):
            found[places] = self.parts[owner].num_positions(own)
        return found

    def shards(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),), the number of each key's shard, counted over all caches.  Raises as :meth:`read` does."""
        found = np.empty(len(keys), dtype=np.int64)
        for owner, places, own in self._by_owner(keys, names):
            found[places] = self.parts[owner].shards(own) + self._first_shards[owner]
        return found

    def read(
        self, keys: Sequence[bytes], *, names: Sequence[str] = ()
    ) -> tuple[list[torch.Tensor], SparseTargets]:
        """As ``CacheReader.read``.

        Raises   CacheMismatchError  for a key that is in none of them; ``names`` say which example that is
                 CacheFormatError    when a shard is damaged
        """
        rows = self.rows(keys, names=names)
        return [torch.from_numpy(row.answer_ids) for row in rows], self.targets(rows)

    def rows(self, keys: Sequence[bytes], *, names: Sequence[str] = ()) -> list[Row]:
        """The rows of these keys, their payloads not decoded.  Raises as :meth:`read` does."""
        found: dict[int, Row] = {}
        for owner, places, own in self._by_owner(keys, names):
            found |= zip(places.tolist(), self.parts[owner].rows(split_keys(own)), strict=True)
        return [found[place] for place in range(len(keys))]

    def targets(self, rows: Sequence[Row]) -> SparseTargets:
        """The rows' payloads decoded, one after the other, with their entropies."""
        try:
            return self.parts[0].targets(rows)  # all were captured alike
        except CacheFormatError:
            for row, owner in zip(rows, self._find([row.key for row in rows]).tolist(), strict=True):
                self.parts[owner].targets([row])  # says which one it is
            raise

    @property
    def has_label_log_prob(self) -> bool:
        """Whether rows carry the teacher's log-prob of each written token."""
        return self.parts[0].has_label_log_prob

    def label_log_probs(self, rows: Sequence[Row]) -> torch.Tensor:
        """As ``CacheReader.label_log_probs``."""
        return self.parts[0].label_log_probs(rows)

    @property
    def visual_gain(self) -> VisualGain | None:
        """As ``CacheReader.visual_gain``."""
        return self.parts[0].visual_gain

    def label_gains(self, rows: Sequence[Row]) -> torch.Tensor:
        """As ``CacheReader.label_gains``."""
        return gains_of(rows, where=self.where)

    def keys(self) -> Iterator[bytes]:
        """All keys in stored order, one cache after the other."""
        for number, part in enumerate(self.parts):
            for keys in part.index.shard_columns():
                held = split_keys(keys[0])
                owners = self._find(held) if self._num_shadowed else np.full(len(held), number)
                yield from (key for key, owner in zip(held, owners.tolist(), strict=True) if owner == number)

    def _find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """(len(keys),) the first cache that has each, -1 where none has."""
        owners = np.full(len(keys), -1, dtype=np.int64)
        for number in reversed(range(len(self.parts))):
            owners[self.parts[number].contains(keys)] = number
        return owners

    def _owners(self, keys: Keys, names: Sequence[str]) -> npt.NDArray[np.int64]:
        owners = self._find(keys)
        require_none(self.where, "none of them has", np.flatnonzero(owners < 0), keys, names)
        return owners

    def _by_owner(
        self, keys: Keys, names: Sequence[str]
    ) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.bytes_]]]:
        """Of each cache that gives some of the rows: its number, the places of their keys, and the keys."""
        wanted = as_key_array(keys)
        owners = self._owners(wanted, names)
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            yield owner, places, wanted[places]
