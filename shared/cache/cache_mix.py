"""Caches of the same rows by several teachers, asked as one is: a row's targets are the weighted sum of theirs.

cache = CacheMix(["caches/large", "caches/specialist"], weights=[0.7, 0.3])
targets = cache.targets(cache.rows(keys))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from shared.cache.gains import gains_of
from shared.cache.index import Keys, split_keys
from shared.cache.overlap import key_ranges
from shared.cache.reader import CacheReader
from shared.cache.shard import Row
from shared.cache.staging import Staging
from shared.cache.together import Together, digest_of, require_none
from shared.errors import CacheMismatchError
from shared.recipes.policies import VisualGain
from shared.sparse import MixedTargets, mix


@dataclass(frozen=True, eq=False)
class MixedRow:
    """What the caches of a mix hold of one example: a row each.

    Units    ce_sum in nats, the mean of the teachers' own by their shares
    """

    rows: tuple[Row, ...]
    shares: tuple[float, ...]

    @property
    def key(self) -> bytes:
        return self.rows[0].key

    @property
    def answer_ids(self) -> npt.NDArray[np.int32]:
        """(n,) int32, the same in all."""
        return self.rows[0].answer_ids

    @property
    def num_positions(self) -> int:
        return self.rows[0].num_positions

    @property
    def label_gain(self) -> npt.NDArray[np.float32] | None:
        """(n,), the mean of the teachers' own by their shares, nats; None where one of them has none."""
        found = [row.label_gain for row in self.rows if row.label_gain is not None]
        if len(found) < len(self.rows):
            return None
        return np.sum(
            [one.astype(np.float32) * share for one, share in zip(found, self.shares, strict=True)], axis=0
        )

    @property
    def ce_sum(self) -> float:
        return sum(row.ce_sum * share for row, share in zip(self.rows, self.shares, strict=True))


class CacheMix(Together):
    """Caches of the same rows: a row's targets are the sum of all, each with its weight.

    weights  above 0; they sum to 1.  None: equal ones

    Raises   CacheMismatchError  when rows of these caches cannot be added up
             CacheFormatError    as a CacheReader does
    """

    kind = "mix of caches"
    many_teachers = True
    same_rows = True
    remedy = (
        "The teachers of a mix need one tokenizer, one template and one policy: their targets are added up, entry by "
        "entry. Leave one out, or capture its rows again."
    )

    def __init__(
        self,
        locations: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        staging: Staging | None = None,
    ) -> None:
        weights = [1 / max(1, len(locations))] * len(locations) if weights is None else weights
        if (
            len(weights) != len(locations)
            or not all(one > 0 for one in weights)
            or abs(sum(weights) - 1) > 1e-6
        ):
            raise CacheMismatchError(
                f"mix of {len(locations)} caches: the weights {', '.join(f'{one:g}' for one in weights)} must be as "
                "many, above 0, and sum to 1"
            )
        self.weights = tuple(one / sum(weights) for one in weights)
        super().__init__(locations, staging)

    def _compare(self) -> tuple[str, ...]:
        notices = super()._compare()
        if not self.temperatures:
            sides = "; ".join(
                f"{part.location} {', '.join(map(str, part.temperatures))}" for part in self.parts
            )
            raise CacheMismatchError(
                f"{self.where}: no temperature is in all of them: {sides}. {self.remedy}"
            )
        return notices

    def __len__(self) -> int:
        """Examples that all of them hold."""
        return self._num_common

    @cached_property
    def _num_common(self) -> int:
        need = len(self.parts) - 1
        ranges = key_ranges([part.index for part in self.parts])
        return sum(int((keys[need:] == keys[: len(keys) - need]).sum()) for keys, _ in ranges)

    @cached_property
    def fingerprint(self) -> str:
        """Hex, of what they hold, with their weights, in their order."""
        return digest_of("mix", [part.fingerprint for part in self.parts], self.weights)

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Why rows are not in all of them, by the key in hex."""
        return {
            key: f"{part.location}: {reason}"
            for part in reversed(self.parts)
            for key, reason in part.skipped.items()
            if bytes.fromhex(key) not in part
        }

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """One, made of the names and shares of all."""
        told = [
            f"{weight:g} {part.manifest.identity.teacher.label}"
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return (" + ".join(told),)

    def teachers(self, keys: Keys) -> list[str]:
        """The same for each row."""
        return list(self.teacher_names) * len(keys)

    def teachers_digest(self, keys: Keys) -> str:
        """The same for any rows: the fingerprints of all teachers' weights, and their shares."""
        weights = [part.manifest.identity.teacher.weights_fingerprint for part in self.parts]
        return digest_of(sorted(zip(weights, self.weights, strict=True)))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(len(keys),) bool: whether all of them have it."""
        return np.all([part.contains(keys) for part in self.parts], axis=0)

    def lacking(self, keys: Keys) -> list[tuple[CacheReader, npt.NDArray[np.int64]]]:
        """Each cache that lacks some of the keys, and their places."""
        found = [(part, np.flatnonzero(~part.contains(keys))) for part in self.parts]
        return [(part, places) for part, places in found if len(places)]

    def num_positions(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),) int64, from an index alone.  Raises as :meth:`read` does."""
        self._require_all(keys, names)
        return self.parts[0].num_positions(keys)

    def shards(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),), the number of each key's shard in the largest of the remote caches, else in the first."""
        self._require_all(keys, names)
        remote = [part for part in self.parts if part.staging_bytes is not None]
        return max(remote, key=lambda part: part.manifest.totals.bytes, default=self.parts[0]).shards(keys)

    def read(
        self, keys: Sequence[bytes], *, names: Sequence[str] = ()
    ) -> tuple[list[torch.Tensor], MixedTargets]:
        """As ``CacheReader.read``, with the weighted sum of all targets.

        Raises   CacheMismatchError  for a key that is not in all of them, or whose answers differ
                 CacheFormatError    when a shard is damaged
        """
        rows = self.rows(keys, names=names)
        return [torch.from_numpy(row.answer_ids) for row in rows], self.targets(rows)

    def rows(self, keys: Sequence[bytes], *, names: Sequence[str] = ()) -> list[MixedRow]:
        """The rows of these keys in all of them, not decoded.  Raises as :meth:`read` does."""
        self._require_all(keys, names)
        found = [
            MixedRow(rows, self.weights)
            for rows in zip(*(part.rows(keys) for part in self.parts), strict=True)
        ]
        for place, one in enumerate(found):
            for part, row in zip(self.parts, one.rows, strict=True):
                if not np.array_equal(row.answer_ids, one.answer_ids):
                    name = names[place] if names else f"example {row.key.hex()}"
                    raise CacheMismatchError(
                        f"{name}: its answer has {row.num_positions} tokens in cache {part.location} and "
                        f"{one.num_positions} in cache {self.parts[0].location}, or others. Capture one of them again"
                    )
        return found

    def targets(self, rows: Sequence[MixedRow]) -> MixedTargets:
        """The rows' payloads decoded, one after the other, added up."""
        decoded = [part.targets([one.rows[number] for one in rows]) for number, part in enumerate(self.parts)]
        return mix(decoded, shares=self.weights)

    @property
    def has_label_log_prob(self) -> bool:
        """Of no mix: the log of a mean is no mean of logs."""
        return False

    @property
    def visual_gain(self) -> VisualGain | None:
        """As ``CacheReader.visual_gain``, where all were captured alike in this; else None."""
        found = {part.visual_gain for part in self.parts}
        return found.pop() if len(found) == 1 else None

    def label_gains(self, rows: Sequence[MixedRow]) -> torch.Tensor:
        """As ``CacheReader.label_gains``: the means of the teachers' own by their weights."""
        return gains_of(rows, where=self.where)

    def keys(self) -> Iterator[bytes]:
        """All keys that each of them has, in the stored order of the first."""
        first, *others = self.parts
        for keys, _ in first.index.shard_columns():
            held = split_keys(keys)
            in_all = (
                np.all([part.contains(held) for part in others], axis=0) if others else [True] * len(held)
            )
            yield from (key for key, has in zip(held, in_all, strict=True) if has)

    def _require_all(self, keys: Keys, names: Sequence[str]) -> None:
        for part, places in self.lacking(keys):
            require_none(self.where, f"cache {part.location} has not", places, keys, names)
