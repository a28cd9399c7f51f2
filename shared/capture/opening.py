"""A cache opened for a capture: what is broken is removed, what is missing is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shared.cache import (
    CacheBusyError,
    CacheReader,
    CacheWriter,
    Identity,
    Plan,
    SkippedRow,
    Unit,
    Wanted,
)
from shared.cache.claimant import somebody_at_work, somebody_may_be_at_work
from shared.cache.index import Keys
from shared.cache.layout import shard_names, unit_in
from shared.completeness import broken_shards
from shared.runtime import environment


def open_planned(
    location: str,
    identity: Identity,
    keys: Keys,
    numbers: npt.NDArray[np.int64],
    *,
    examples_per_shard: int,
    skipped: Sequence[SkippedRow] = (),
    facts: Mapping[str, str] | None = None,
    with_others: bool = False,
    timeout_s: float = 180.0,
) -> tuple[CacheWriter, Plan, list[Unit]]:
    """A writer, its plan, and the units without a whole shard.

    keys         all that the cache is to hold; ``numbers``, (n,), are the caller's own of their rows
    facts        for the manifest's ``created_by``, beside the versions
    with_others  other processes may capture what this one does, by claims; the folder is locked for the planning
                 alone.  False: it is this process's own until the writer is closed
    timeout_s    after which a silent process is taken to be dead
    Raises   as ``CacheWriter.open``, and CacheBusyError  while others capture something else into the folder
    """
    created_by = created_by_versions() | dict(facts or {})
    writer = CacheWriter.open(location, identity, created_by=created_by, for_a_moment=with_others)
    try:
        plan = writer.stored_plan() if with_others else None
        if plan is None and (owner := somebody_at_work(writer.folder, timeout_s=timeout_s)) is not None:
            raise CacheBusyError(
                f"{writer.folder.where}: {owner} captures into it, by another plan. Wait until it has ended, or "
                "stop it."
            )
        _discard_broken_shards(location, writer, keys)
        plan = writer.stored_plan() or writer.plan(
            Wanted.of(keys, numbers), examples_per_shard=examples_per_shard, skipped=skipped
        )
        if with_others:
            writer.close()
        if with_others and somebody_may_be_at_work(writer.folder):  # who has read what lies there
            there = {unit_in(name) for name in shard_names(writer.folder)}
            return writer, plan, [unit for unit in plan.units if unit.unit_id not in there]
        return writer, plan, [unit for unit in plan.units if not writer.is_finished(unit)]
    except BaseException:
        writer.close()
        raise


def _discard_broken_shards(location: str, writer: CacheWriter, keys: Keys) -> None:
    """Leaves the plan no file that its manifest convicts: what is gone is planned again."""
    if writer.manifest is not None:
        for name in broken_shards(CacheReader(location), keys):
            writer.folder.remove(name)


def created_by_versions() -> dict[str, str]:
    """For the manifest's ``created_by``."""
    facts = environment()
    return {name: str(facts[name]) for name in ("teachonce", "torch", "transformers")}
