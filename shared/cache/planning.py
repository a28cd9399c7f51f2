"""Cutting what is wanted, and not yet there, into units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from shared.cache.format import canonical_json
from shared.cache.index import CacheIndex, Keys, as_key_array
from shared.cache.plan import Unit, make_unit

MAX_NEIGHBOURS = 64  # refused examples on each side of a lost shard's own that may be of its unit


@dataclass(frozen=True, eq=False)
class Wanted:
    """The examples a cache shall hold, in order, equal ones once.

    Shapes   keys (n,) S16; rows (n,) int64, the caller's own numbers of them
    """

    keys: npt.NDArray[np.bytes_]
    rows: npt.NDArray[np.int64]
    duplicates: int

    @classmethod
    def of(cls, keys: Keys, rows: npt.NDArray[np.int64]) -> Wanted:
        """The first of equal keys counts."""
        found = as_key_array(keys)
        firsts = np.sort(np.unique(found, return_index=True)[1])
        return cls(found[firsts], np.asarray(rows, np.int64)[firsts], len(found) - len(firsts))

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[bytes, int]]) -> Wanted:
        """From (key, row number) pairs."""
        keys, rows = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
        return cls.of(keys, np.array(rows, np.int64))

    @cached_property
    def _index(self) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
        order = np.argsort(self.keys, kind="stable")
        return self.keys[order], order

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """(len(keys),) places in ``keys`` and ``rows``, -1 of those that are not wanted."""
        asked, (ordered, order) = as_key_array(keys), self._index
        if not len(ordered):
            return np.full(len(asked), -1)
        place = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
        return np.where(ordered[place] == asked, order[place], -1)

    def request(
        self, identity_digest: str, *, base: str | None, lost: Sequence[int], examples_per_shard: int
    ) -> str:
        """Hex digest of all that decides a plan's units."""
        settings = [identity_digest, base, list(lost), examples_per_shard]
        digest = hashlib.sha256(canonical_json(settings).encode())
        digest.update(self.keys.tobytes())
        return digest.hexdigest()


def cut_units(
    wanted: Wanted,
    *,
    identity_digest: str,
    committed: CacheIndex,
    lost: Mapping[int, str],
    refused: Sequence[bytes],
    kept: Sequence[Unit],
    examples_per_shard: int,
) -> list[Unit]:
    """The units of all wanted examples that the committed shards do not hold.

    ``lost``  places of committed shards whose files are gone, and the ids of their units: each is one unit again, in
              its old place and order, if all its examples are still wanted
    ``refused``  keys that the committed cache leaves out: those that a lost shard left out, as its id says, belong to
                 its unit.  The others are tried again, unless all else that is wanted are such units
    ``kept``  units of an older plan that are already captured: kept where all their examples are wanted

    Returns   repairs, then kept units, then the rest, ``examples_per_shard`` at a time in the order wanted
    """
    found = committed.find(wanted.keys)
    shards, _ = committed.locate(found[found >= 0])
    is_planned = np.zeros(len(wanted.keys), dtype=bool)
    is_planned[found >= 0] = ~np.isin(shards, list(lost))
    left_out = wanted.find(refused)
    left_out = np.sort(left_out[left_out >= 0])
    candidates: list[tuple[Keys, int | None]] = list(_lost_keys(committed, lost))
    candidates += [(unit.key_array, None) for unit in kept if unit.slot is None]
    units: list[Unit] = []
    for keys, slot in candidates:
        places = wanted.find(keys)
        if slot is not None and len(places) and (places >= 0).all():
            places = _with_refused(identity_digest, wanted, places, left_out, unit_id=lost[slot])
        # A lost shard may have had no rows: all its examples were refused.
        if len(places) and (places >= 0).all() and not is_planned[places].any():
            units.append(_unit(identity_digest, wanted, places, slot))
            is_planned[places] = True
    rest = np.flatnonzero(~is_planned)
    again = {unit.slot for unit in units if unit.slot is not None and unit.unit_id == lost[unit.slot]}
    if lost and again == set(lost) and len(units) == len(lost) and np.isin(rest, left_out).all():
        return units  # a repair alone: what was refused elsewhere stays so, and the manifest what it was
    for start in range(0, len(rest), examples_per_shard):
        units.append(_unit(identity_digest, wanted, rest[start : start + examples_per_shard], None))
    return units


def _with_refused(
    identity_digest: str,
    wanted: Wanted,
    places: npt.NDArray[np.int64],
    left_out: npt.NDArray[np.int64],
    *,
    unit_id: str,
) -> npt.NDArray[np.int64]:
    """The places of a lost shard's examples and of those that it left out; of the former alone where no unit fits.

    A unit is a run of what was wanted: all refused examples between its own belong to it, and some before and behind.
    ``left_out``: ascending
    """
    first, last = np.searchsorted(left_out, [places.min(), places.max()]).tolist()
    begins = range(first, max(first - MAX_NEIGHBOURS, 0) - 1, -1)
    ends = range(last, min(last + MAX_NEIGHBOURS, len(left_out)) + 1)
    for begin, end in product(begins, ends):
        all_places = np.sort(np.concatenate([places, left_out[begin:end]]))
        if _unit(identity_digest, wanted, all_places, None).unit_id == unit_id:
            return all_places
    return places


def _lost_keys(committed: CacheIndex, lost: Mapping[int, str]) -> Iterator[tuple[Keys, int]]:
    """The keys of each lost shard, in its order, and its place."""
    for place, (keys, _) in enumerate(committed.shard_columns() if lost else ()):
        if place in lost:
            yield keys, place


def _unit(identity_digest: str, wanted: Wanted, places: npt.NDArray[np.int64], slot: int | None) -> Unit:
    return make_unit(identity_digest, wanted.keys[places], wanted.rows[places], slot=slot)
