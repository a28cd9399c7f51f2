"""Cutting what is wanted, and not yet there, into units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.cache.format import canonical_json
from shared.cache.index import CacheIndex, as_key_array, split_keys
from shared.cache.plan import Unit, make_unit


@dataclass(frozen=True, eq=False)
class Wanted:
    """The examples a cache shall hold, in order, equal ones once: key -> the caller's row number."""

    rows: Mapping[bytes, int]
    duplicates: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bytes, int]]) -> Wanted:
        """From (key, row number) pairs; the first of equal keys counts."""
        first: dict[bytes, int] = {}
        total = 0
        for key, row in pairs:
            first.setdefault(key, row)
            total += 1
        as_key_array(list(first))  # checks their lengths
        return cls(first, total - len(first))

    def request(
        self, identity_digest: str, *, base: str | None, lost: Sequence[int], examples_per_shard: int
    ) -> str:
        """Hex digest of all that decides a plan's units."""
        settings = [identity_digest, base, list(lost), examples_per_shard]
        digest = hashlib.sha256(canonical_json(settings).encode())
        digest.update(b"".join(self.rows))
        return digest.hexdigest()


def cut_units(
    wanted: Wanted,
    *,
    identity_digest: str,
    committed: CacheIndex,
    lost: Sequence[int],
    kept: Sequence[Unit],
    examples_per_shard: int,
) -> list[Unit]:
    """The units of all wanted examples that the committed shards do not hold.

    ``lost``  places of committed shards whose files are gone: each is one unit again, in its old place and
              order, if all its examples are still wanted
    ``kept``  units of an older plan that are already captured: kept where all their examples are wanted

    Returns   repairs, then kept units, then the rest, ``examples_per_shard`` at a time in the order wanted
    """
    keys = list(wanted.rows)
    found = committed.find(keys)
    shards, _ = committed.locate(found[found >= 0])
    is_held = np.zeros(len(keys), dtype=bool)
    is_held[found >= 0] = ~np.isin(shards, lost)
    planned = {key for key, held in zip(keys, is_held.tolist(), strict=True) if held}
    candidates: list[tuple[Sequence[bytes], int | None]] = list(_lost_keys(committed, lost))
    candidates += [(unit.keys, None) for unit in kept if unit.slot is None]
    units = []
    for ours, slot in candidates:
        if all(key in wanted.rows for key in ours) and planned.isdisjoint(ours):
            units.append(_unit(identity_digest, ours, wanted.rows, slot))
            planned.update(ours)
    rest = [key for key in keys if key not in planned]
    for start in range(0, len(rest), examples_per_shard):
        units.append(_unit(identity_digest, rest[start : start + examples_per_shard], wanted.rows, None))
    return units


def _lost_keys(committed: CacheIndex, lost: Sequence[int]) -> Iterator[tuple[Sequence[bytes], int]]:
    """The keys of each lost shard, in its order, and its place."""
    wanted = set(lost)
    for place, (keys, _) in enumerate(committed.shard_columns() if wanted else ()):
        if place in wanted:
            yield split_keys(keys), place


def _unit(identity_digest: str, keys: Sequence[bytes], rows: Mapping[bytes, int], slot: int | None) -> Unit:
    return make_unit(identity_digest, keys, np.array([rows[key] for key in keys], dtype=np.int64), slot=slot)
