"""A cache opened for a capture: what is broken is removed, what is missing is planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

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
from shared.cache.claimant import Claimant, somebody_at_work, somebody_may_capture
from shared.cache.index import Keys
from shared.cache.layout import shard_names, unit_in
from shared.cache.lock import never
from shared.completeness import broken_shards
from shared.runtime import environment


@dataclass(frozen=True, eq=False)
class Opened:
    """A cache that is to be captured.

    pending      the units of the plan without a whole shard
    num_skipped  examples that the shards of the others leave out; 0 beside processes that capture already: these have
                 read the shards, and tell how many
    """

    writer: CacheWriter
    plan: Plan
    pending: list[Unit]
    num_skipped: int


def open_planned(
    location: str,
    identity: Identity,
    keys: Keys,
    numbers: npt.NDArray[np.int64],
    *,
    examples_per_shard: int,
    skipped: Sequence[SkippedRow] = (),
    facts: Mapping[str, str] | None = None,
    with_others: ExitStack | None = None,
    timeout_s: float = 180.0,
    patience_s: float = 600.0,
    is_stopped: Callable[[], bool] = never,
) -> Opened:
    """Opens the cache for its capture, and plans what has no plan yet.

    keys         all that the cache is to hold; ``numbers``, (n,), are the caller's own of their rows
    facts        for the manifest's ``created_by``, beside the versions
    with_others  other processes may capture what this one does, by claims; the folder is locked for the planning
                 alone, and those with another plan see this process at work until the stack is closed: by then it
                 has claims, or has given up.  None: the folder is its own until the writer is closed
    timeout_s    after which a silent process is taken to be dead
    patience_s   as of claims
    is_stopped   asked while it waits for the lock
    Raises   as ``CacheWriter.open``, and CacheBusyError  while others capture something else into the folder
    """
    created_by = created_by_versions() | dict(facts or {})
    is_shared = with_others is not None
    writer = CacheWriter.open(
        location, identity, created_by=created_by, for_a_moment=is_shared, is_stopped=is_stopped
    )
    try:
        plan = writer.stored_plan() if is_shared else None
        if plan is None and (owner := somebody_at_work(writer.folder, timeout_s=timeout_s)) is not None:
            raise CacheBusyError(
                f"{writer.folder.where}: {owner} captures into it, by another plan. Wait until it has ended, or "
                "stop it."
            )
        _discard_broken_shards(location, writer, keys)
        plan = writer.stored_plan() or writer.plan(
            Wanted.of(keys, numbers), examples_per_shard=examples_per_shard, skipped=skipped
        )
        if with_others is None:
            return _read(writer, plan)
        # After the writer has looked at the shards: none of those that it is to read is of a session under way.
        is_read = somebody_may_capture(writer.folder)
        # While the lock is held: who comes next finds somebody at work.
        me = Claimant(writer.folder, timeout_s=timeout_s, patience_s=patience_s, plans=True, idle=True)
        with_others.enter_context(me)
        writer.close()
        if not is_read:
            return _read(writer, plan, go_on=me.check)
        there = {unit_in(name) for name in shard_names(writer.folder)}
        return Opened(writer, plan, [unit for unit in plan.units if unit.unit_id not in there], 0)
    except BaseException:
        writer.close()
        raise


def _read(writer: CacheWriter, plan: Plan, *, go_on: Callable[[], None] = lambda: None) -> Opened:
    """Reads the shards that are there; ``go_on`` is called before each."""
    pending, num_skipped = [], 0
    for unit in plan.units:
        go_on()
        found = writer.num_skipped(unit)
        if found is None:
            pending.append(unit)
        else:
            num_skipped += found
    return Opened(writer, plan, pending, num_skipped)


def _discard_broken_shards(location: str, writer: CacheWriter, keys: Keys) -> None:
    """Leaves the plan no file that its manifest convicts: what is gone is planned again."""
    if writer.manifest is not None:
        for name in broken_shards(CacheReader(location), keys):
            writer.folder.remove(name)


def created_by_versions() -> dict[str, str]:
    """For the manifest's ``created_by``."""
    facts = environment()
    return {name: str(facts[name]) for name in ("teachonce", "torch", "transformers")}
