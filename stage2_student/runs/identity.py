"""What a run is made of, so that ``--resume`` goes on with the same run or refuses.

The recipe is compared key by key, but for the keys below.  Data set, cache and tokenizer are compared by
content, so their folders may move.
"""

from __future__ import annotations

from typing import Any

from shared.errors import CheckpointError
from shared.recipes import Recipe, dump_recipe

# A resumed run may differ in these.  Above: what has a fingerprint of its own in the identity.  Below: what
# changes how a run is executed, its length and its rhythm, and its losses by no more than rounding.
MAY_CHANGE = (
    *("bootstrap", "teacher", "cache"),
    *("data.format", "data.answers", "data.text_only", "data.train_on", "data.date"),
    *("data.source", "data.revision", "data.columns", "data.splits", "data.limit", "data.max_dropped"),
    *("student.attn_implementation", "student.activation_checkpointing"),
    *("student.lora.merge", "student.compile", "student.compile_backend", "loss.chunk_size", "parallel"),
    *("optimization.microbatch_size", "optimization.microbatch_tokens"),
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


def run_identity(recipe: Recipe, *, contents: dict[str, str | None]) -> dict[str, Any]:
    """Flat: ``contents`` (fingerprints by name) and the recipe's keys that must not change."""
    keys = {
        f"recipe.{key}": value for key, value in flat(dump_recipe(recipe)).items() if not _may_change(key)
    }
    return dict(contents) | keys


# What changes with rows that were mended, left out or added: a cache gets a new manifest when they are captured.
OF_DATA = {"data.train", "data.validation", "cache.manifest"}
ACCEPT = "--accept-data-change"


def differences(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys.  A setting that the run's version did not know is no difference as long as it is null."""
    return [key for key in sorted(found.keys() | now.keys()) if found.get(key) != now.get(key)]


def require_same(
    found: dict[str, Any], now: dict[str, Any], *, where: str, accept_data_change: bool = False
) -> None:
    """Raises CheckpointError with both sides of every difference.

    accept_data_change  those of the data alone are left to whoever compares the rows
    """
    missing, differing = "nothing", differences(found, now)
    of_data = set(differing) <= OF_DATA
    if not differing or (of_data and accept_data_change):
        return
    lines = [
        f"  - {key}: the run has {found.get(key, missing)!r}, now it is {now.get(key, missing)!r}"
        for key in differing
    ]
    remedy = (
        f"Give these back; or add {ACCEPT} if rows were mended, left out or added on purpose. It is refused where a "
        "row has been trained on and is not used again"
        if of_data
        else "Give these back, or another run.name. What may change: " + ", ".join(MAY_CHANGE)
    )
    raise CheckpointError(
        f"{where}: it cannot be resumed, {len(lines)} thing(s) differ:\n" + "\n".join(lines) + f"\n{remedy}"
    )


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
