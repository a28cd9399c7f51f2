"""What a run is made of, so that ``--resume`` goes on with the same run or refuses.

The recipe is compared key by key, but for the keys below.  Data set, cache and tokenizer are compared by
content, so their folders may move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.errors import CheckpointError
from shared.recipes import Recipe, dump_recipe

# A resumed run may differ in these.  Above: what has a fingerprint of its own in the identity.  Below: what
# changes how a run is executed, its length and its rhythm, and its losses by no more than rounding.
MAY_CHANGE = (
    *("bootstrap", "teacher", "cache", "write", "rounds"),
    *("data.format", "data.answers", "data.text_only", "data.train_on", "data.date"),
    *(
        "data.source",
        "data.written",
        "data.revision",
        "data.config",
        "data.columns",
        "data.splits",
        "data.limit",
        "data.max_dropped",
    ),
    *("student.attn_implementation", "student.activation_checkpointing"),
    *("student.lora.merge", "student.compile", "student.compile_backend", "loss.chunk_size", "parallel"),
    *("optimization.microbatch_size", "optimization.microbatch_tokens", "optimization.packing"),
    *("optimization.max_steps", "optimization.num_epochs"),
    *("optimization.max_skipped_steps", "run.name", "run.root", "run.validate_every", "run.checkpoint_every"),
    *(
        "run.checkpoint_minutes",
        "run.keep_checkpoints",
        "run.async_checkpoints",
        "run.num_workers",
        "run.export",
        "run.trackers",
        "evaluation",
    ),
)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"loss": {"kd_ratio": 1}}`` as ``{"loss.kd_ratio": 1}``; lists and empty mappings are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def run_identity(recipe: Recipe, *, contents: dict[str, Any]) -> dict[str, Any]:
    """Flat: ``contents`` (fingerprints by name) and the recipe's keys that must not change."""
    keys = {
        f"recipe.{key}": value for key, value in flat(dump_recipe(recipe)).items() if not _may_change(key)
    }
    if not recipe.student.other_vocabulary:  # which runs before it did not know
        del keys["recipe.student.other_vocabulary"]
    return dict(contents) | keys


OWN = "data.own"  # which training rows' answers the student wrote, where the loss counts them otherwise
# What changes with rows that were mended, left out or added.
OF_DATA = {"data.train", "data.validation", OWN}
# A cache gets a new manifest when rows are added to it: whoever compares the rows compares its teacher and targets.
CACHE = "cache.manifest"
MIX = "cache.mix"  # whose targets are added up, with which weights; there is none without a mix
ORDER = "order"  # of the steps' examples: the release's own
BY_SHARDS = "windows of"  # in an order that follows the cache's shards
ACCEPT = "--accept-data-change"
# Settings that make something else of the same rows: who changes one has not mended a row.
OF_ROWS = (
    *("data.format", "data.answers", "data.text_only", "data.train_on"),
    *(
        f"data.columns.{name}"
        for name in ("image", "question", "answer", "messages", "conversations", "written_by")
    ),
)


def differences(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys.  A setting that the run's version did not know is no difference as long as it is null.

    Nor is which rows are the student's own, where the run's version did not write that down.
    """
    keys = sorted(found.keys() | now.keys() - ({OWN} - found.keys()))
    return [key for key in keys if found.get(key) != now.get(key) and not _was_a_setting(key)]


def settings_of_rows(before: Recipe | None, now: Recipe) -> list[str]:
    """A line with both sides for each setting that makes something else of the same rows."""
    if before is None:
        return []
    sides = [
        {key: value for key, value in flat(dump_recipe(recipe)).items() if _is_one_of(key, OF_ROWS)}
        for recipe in (before, now)
    ]
    return _both_sides(*sides)


def differing_settings(one: Recipe, other: Recipe) -> list[str]:
    """Keys in which two runs differ beside their loss; what changes how a run is executed, or its length, is none."""
    compared = ("data", *(("cache.path", "cache.mix") if one.distils and other.distils else ()))
    sides = [
        {
            key: value
            for key, value in flat(dump_recipe(recipe)).items()
            if _is_one_of(key, compared) or not (_may_change(key) or key.startswith("loss."))
        }
        for recipe in (one, other)
    ]
    return differences(*sides)


def require_same(
    found: dict[str, Any],
    now: dict[str, Any],
    *,
    where: str,
    accept_data_change: bool = False,
    settings: Sequence[str] = (),
) -> None:
    """Raises CheckpointError with both sides of every difference, but for that of a cache's manifest alone.

    accept_data_change  those of the data alone are left to whoever compares the rows
    settings            of the rows that have changed, which explain why the data differ
    """
    differing = differences(found, now)
    if set(differing) <= {CACHE}:
        return
    of_data = set(differing) <= OF_DATA | {CACHE} and differing != [OWN]  # without which no row has changed
    if of_data and accept_data_change and not settings:
        return
    lines = [*(settings if OF_DATA & set(differing) else ()), *_both_sides(found, now)]
    remedy = "Give these back, or another run.name. What may change: " + ", ".join(MAY_CHANGE)
    by_shards = all(BY_SHARDS in str(side.get(ORDER)) for side in (found, now))
    if set(differing) == {ORDER}:
        remedy = (
            "The examples would come in another order. Give cache.shuffle_window back if that differs; else finish "
            "the run with the release that began it (see its environment.json), or choose another run.name"
        )
    elif ORDER in differing and set(differing) <= OF_DATA | {CACHE, ORDER} and by_shards:
        remedy = (
            "The examples follow the cache's shards (cache.shuffle_window), so neither rows nor shards can change on "
            f"the way, and {ACCEPT} does not help. Give the old ones back, or another run.name"
        )
    if of_data:
        remedy = (
            f"Give the settings back, or another run.name; {ACCEPT} is for rows that were mended, left out or added"
            if settings
            else f"Give these back; or add {ACCEPT} if rows were mended, left out or added on purpose. It is refused "
            "where a row has been trained on and is not used again"
        )
    raise CheckpointError(
        f"{where}: it cannot be resumed, {len(lines)} thing(s) differ:\n" + "\n".join(lines) + f"\n{remedy}"
    )


def _both_sides(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    missing = "nothing"
    return [
        f"  - {key}: the run has {found.get(key, missing)!r}, now it is {now.get(key, missing)!r}"
        for key in differences(found, now)
    ]


def _was_a_setting(key: str) -> bool:
    """Whether it is one that may change, and that an earlier release wrote down."""
    return key.startswith("recipe.") and _may_change(key.removeprefix("recipe."))


def _may_change(key: str) -> bool:
    return _is_one_of(key, MAY_CHANGE)


def _is_one_of(key: str, allowed: Sequence[str]) -> bool:
    """Whether it is one of these keys, or in one of these sections."""
    return any(key == one or key.startswith(f"{one}.") for one in allowed)
