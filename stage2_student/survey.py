"""A look at every row of a split before the first step: which are usable, how long they are, what they are.

Steps are planned over usable rows, so rows that cannot be used must be known beforehand; and a cache that
lacks a row is better reported now than in the middle of a run.  Pictures are hashed, not decoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from shared.cache import CacheReader
from shared.config import DataConfig, Split
from shared.errors import CacheMismatchError, DataError, TeachonceError
from shared.processing import ExampleProcessor
from shared.runtime import World
from shared.vqa import VqaSplit, open_split


@dataclass(frozen=True)
class Survey:
    """The usable examples of a split.

    rows         (num_examples,) int64, rows of the split
    lengths      (num_examples,) int64, characters of question and answer: a measure to put like with like
    fingerprint  hex, over the keys in order
    dropped      a reason for each row that was left out
    """

    split: VqaSplit
    rows: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    dropped: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        return len(self.rows)


def survey(data: DataConfig, split: Split, processor: ExampleProcessor, cache: CacheReader | None) -> Survey:
    """Raises   DataError           when more rows are unusable than ``data.max_dropped`` allows
    CacheMismatchError  when the cache lacks usable rows
    """
    opened = open_split(data, split)
    rows, keys, lengths, dropped = [], [], [], []
    for row in range(len(opened)):
        try:
            example = opened[row]
        except DataError as error:
            dropped.append(str(error))
            continue
        rows.append(row)
        keys.append(processor.key(example))
        lengths.append(len(example.question) + len(example.answer))
    skipped = {} if cache is None else {row.key: row.reason for row in cache.manifest.skipped if row.key}
    usable = np.array([key.hex() not in skipped for key in keys], dtype=bool)
    dropped += [
        f"{opened.where(rows[i])}: not in the cache: {skipped[keys[i].hex()]}"
        for i in np.flatnonzero(~usable)
    ]
    _check_number(opened, data, num_usable=int(usable.sum()), dropped=dropped)
    wanted = [keys[i] for i in np.flatnonzero(usable)]
    if cache is not None:
        _check_cache(opened, np.array(rows)[usable], wanted, cache)
    return Survey(
        split=opened,
        rows=np.array(rows)[usable],
        lengths=np.array(lengths)[usable],
        fingerprint=hashlib.blake2b(b"".join(wanted), digest_size=16).hexdigest(),
        dropped=tuple(dropped),
    )


def survey_once(
    data: DataConfig, split: Split, processor: ExampleProcessor, cache: CacheReader | None, world: World
) -> Survey:
    """As ``survey``, by the first rank for all."""
    found: list[Survey | TeachonceError | None] = [None]
    if world.is_main:
        try:
            found = [survey(data, split, processor, cache)]
        except TeachonceError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], TeachonceError):
        raise found[0]
    assert found[0] is not None
    return found[0]


def _check_number(split: VqaSplit, data: DataConfig, *, num_usable: int, dropped: list[str]) -> None:
    if len(dropped) > data.max_dropped:
        listed = "\n".join(f"  - {reason}" for reason in dropped[:10])
        raise DataError(
            f"{split.source}, split {split.name}: {len(dropped)} row(s) cannot be used, data.max_dropped "
            f"allows {data.max_dropped}:\n{listed}"
        )
    if not num_usable:
        raise DataError(f"{split.source}, split {split.name}: no row can be used")


def _check_cache(split: VqaSplit, rows: np.ndarray, keys: list[bytes], cache: CacheReader) -> None:
    missing = np.flatnonzero(~cache.contains(keys))
    if len(missing):
        raise CacheMismatchError(
            f"cache {cache.location}: {len(missing)} of {len(keys)} examples are not in it, "
            f"{split.where(int(rows[missing[0]]))} first. Run teacher-cache again: only what is missing "
            "is captured"
        )
