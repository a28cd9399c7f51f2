"""Caches that differ from those a run began with: which have grown, come, gone or changed places.

What a cache holds may grow; whose targets a row has may not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.errors import CheckpointError
from stage2_student.runs.run_folder import RunFolder

Facts = dict[str, Any]  # as ``facts_of_caches`` has them
KINDS = {"teacher": "is of another teacher", "targets": "has other targets"}


def cache_changes(folder: RunFolder, before: Sequence[Facts], now: Sequence[Facts]) -> list[str]:
    """For people, a line for each.

    Raises   CheckpointError  when one is of another teacher, or has other targets, than it had, or all are of others
                              than those that the run had
    """
    teachers = {_weights(old) for old in before}
    if before and not teachers & {_weights(new) for new in now}:
        _require_same_targets(folder, before[0], now[0])
    pairs = _pairs(before, now)
    told = []
    for new in now:
        old = next((old for old, found in pairs if found is new), None)
        if old is None:
            told.append(_added(folder, before, new))
        elif old["sha256"] != new["sha256"]:
            _require_same_targets(folder, old, new)
            told.append(
                f"cache {new['path']}: other examples are in it than before; its teacher and targets are the same"
            )
    kept = [old for old, _ in pairs]
    told += [f"cache {_called(old)}: it is no longer read" for old in before if old not in kept]
    order = [_called(old) for old in before if old in kept]
    if order != (ordered := [_called(old) for new in now for old, found in pairs if found is new]):
        told.append(f"the caches are in another order: {', '.join(order)} before, {', '.join(ordered)} now")
    return told


def _pairs(before: Sequence[Facts], now: Sequence[Facts]) -> list[tuple[Facts, Facts]]:
    """What a cache was, and is now: the same content, or else the same place; one and one are always a pair."""
    if len(before) == len(now) == 1:
        return [(before[0], now[0])]
    pairs: list[tuple[Facts, Facts]] = []
    for name in ("sha256", "path"):
        for new in now:
            if any(new is found for _, found in pairs):
                continue
            for old in before:
                if old.get(name) == new[name] and not any(old is taken for taken, _ in pairs):
                    pairs.append((old, new))
                    break
    return pairs


def _added(folder: RunFolder, before: Sequence[Facts], new: Facts) -> str:
    known = [old for old in before if old["teacher"]["weights_fingerprint"] == _weights(new)]
    for old in known:
        _require_same_targets(folder, old, new)
    told = f"{new['totals']['examples']} examples by {new['teacher']['name']}"
    return f"cache {new['path']}: it was not read before; {told}" + (
        "" if known or not before else ", a new teacher"
    )


def require_same_teachers(folder: RunFolder, before: str | None, now: Sequence[str]) -> None:
    """Of rows for training, as ``teachers_digest`` has them.

    before  None of a run that did not note it
    now     of the rows as they are; where some have changed, also of those that the run had

    Raises   CheckpointError  when it is none of these
    """
    if before is not None and before not in now:
        raise CheckpointError(
            f"run {folder.path}: rows would have the targets of other teachers than before ({before[:12]} before, "
            f"{' or '.join(one[:12] for one in now)} now). Name the caches in the order that they had, new ones "
            "last, and keep the run's rows in them; or give another run.name"
        )


def _require_same_targets(folder: RunFolder, before: Facts, now: Facts) -> None:
    """A cache that has grown by new rows is the same in all else."""
    for name, what in KINDS.items():
        if before.get(name) != now[name]:
            raise CheckpointError(
                f"run {folder.path}: the cache {what}: {before.get(name)} before, {now[name]} now. Give the old one "
                "back, or another run.name"
            )


def _weights(facts: Facts) -> str:
    return str(facts["teacher"]["weights_fingerprint"])


def _called(facts: Facts) -> str:
    return str(facts.get("path") or facts["sha256"][:12])
