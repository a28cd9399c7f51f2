"""A cache opened for a capture: what is broken is removed, what is missing is planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shared.cache import CacheReader, CacheWriter, Identity, Plan, SkippedRow, Unit
from shared.runtime import environment
from shared.survey import broken_shards


def open_planned(
    location: str,
    identity: Identity,
    keys: Sequence[bytes],
    numbered_keys: Iterable[tuple[bytes, int]],
    *,
    examples_per_shard: int,
    skipped: Sequence[SkippedRow] = (),
    facts: Mapping[str, str] | None = None,
) -> tuple[CacheWriter, Plan, list[Unit]]:
    """The writer of the one process that plans and commits, its plan, and the units without a whole shard.

    keys           all that the cache is to hold
    numbered_keys  the same with the caller's row numbers; looked at only where a plan must be made
    facts          for the manifest's ``created_by``, beside the versions
    Raises   as ``CacheWriter.open``
    """
    writer = CacheWriter.open(location, identity, created_by=_versions() | dict(facts or {}))
    try:
        _discard_broken_shards(location, writer, keys)
        plan = writer.stored_plan() or writer.plan(
            numbered_keys, examples_per_shard=examples_per_shard, skipped=skipped
        )
        return writer, plan, [unit for unit in plan.units if not writer.is_finished(unit)]
    except BaseException:
        writer.close()
        raise


def _discard_broken_shards(location: str, writer: CacheWriter, keys: Sequence[bytes]) -> None:
    """Leaves the plan no file that its manifest convicts: what is gone is planned again."""
    if writer.manifest is not None:
        for name in broken_shards(CacheReader(location), keys):
            writer.folder.remove(name)


def _versions() -> dict[str, str]:
    facts = environment()
    return {name: str(facts[name]) for name in ("teachonce", "torch", "transformers")}
