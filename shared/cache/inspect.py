"""``inspect``: who taught, what is kept, how large it is.

Counts are of the whole cache.  What is in the rows is told by a sample of them, spread evenly over a few
shards that are spread evenly over the cache: a large cache need not be read, and hashed, for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shared.cache.reader import CacheReader

SAMPLED_SHARDS = 32
SAMPLED_ROWS = 2048
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def inspect(reader: CacheReader, *, sampled_rows: int = SAMPLED_ROWS) -> dict[str, Any]:
    """A summary in plain JSON types; lengths in positions, entropies in nats a position, sizes in bytes.

    ``sample`` is None for an empty cache.
    """
    manifest = reader.manifest
    totals = manifest.totals
    return {
        "location": reader.location,
        "sha256": manifest.sha256,
        "format_version": manifest.format_version,
        "identity": manifest.identity.model_dump(mode="json"),
        "created_by": manifest.created_by,
        "totals": totals.model_dump(),
        "shards": len(manifest.shards),
        "bytes_per_position": totals.bytes / totals.positions if totals.positions else None,
        "entries_per_position": totals.entries / totals.positions if totals.positions else None,
        "positions_per_example": _quantiles(reader.index.num_positions),
        "skipped": _counted([row.reason for row in manifest.skipped]),
        "sample": _sample(reader, sampled_rows) if len(reader) else None,
    }


def _sample(reader: CacheReader, size: int) -> dict[str, Any]:
    numbers = _spread(len(reader.manifest.shards), SAMPLED_SHARDS)
    rows = []
    for number in numbers:
        view = reader.shard(number)
        rows += [view.row(row) for row in _spread(len(view), -(-size // len(numbers)))]
    targets = reader.targets(rows)
    positions = sum(row.num_positions for row in rows)
    entropies = np.array([row.entropy_sums for row in rows]).sum(axis=0) / max(positions, 1)
    mass = {}
    for temperature in reader.temperatures:
        kept = torch.zeros(targets.num_positions)
        kept.index_add_(0, targets.position_index, targets.weights(temperature))
        mass[str(temperature)] = {"mean": float(kept.mean()), **_quantiles(kept.numpy())}
    return {
        "rows": len(rows),
        "positions": positions,
        "entries_per_position": _quantiles(targets.counts.numpy()),
        "kept_mass": mass,
        "entropy": {str(t): float(e) for t, e in zip(reader.temperatures, entropies, strict=True)},
        "cross_entropy": sum(row.ce_sum for row in rows) / max(positions, 1),
        "payload_bytes_per_position": sum(len(row.payload) for row in rows) / max(positions, 1),
    }


def _spread(total: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``total``, spread evenly."""
    return [number * total // min(total, most) for number in range(min(total, most))]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{share:.0%}": float(np.quantile(values, share)) for share in QUANTILES}


def _counted(reasons: list[str]) -> dict[str, int]:
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
