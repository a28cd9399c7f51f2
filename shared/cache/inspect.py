"""``inspect``: who taught, what is kept, how large it is.

Counts are of the whole cache.  What is in the rows is told by a sample of them, spread evenly over a few
shards that are spread evenly over the cache: a large cache need not be read, and hashed, for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.cache.reader import CacheReader
from shared.cache.shard import Row
from shared.sparse import SparseTargets

SAMPLED_SHARDS = 32
SAMPLED_ROWS = 2048
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def inspect(reader: CacheReader, *, sampled_rows: int = SAMPLED_ROWS) -> dict[str, Any]:
    """A summary in plain JSON types; lengths in positions, entropies in nats a position, sizes in bytes.

    ``sample`` is None for a cache without positions.
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
        "sample": _summary(sample_rows(reader, sampled_rows)) if totals.positions else None,
    }


@dataclass(frozen=True)
class Sample:
    """Some rows of a cache: R rows with N positions in all.

    rows           the rows themselves; ``targets`` are their positions, one row after the other
    counts_N       entries of each position
    kept_mass_N    by temperature: the sum of the weights of each position
    positions_R    positions of each row
    entropy_R      by temperature: the teacher's, nats a position, mean over the row
    ce_R           the teacher's cross-entropy, nats a position, mean over the row
    payload_R      bytes a position
    """

    rows: list[Row]
    targets: SparseTargets
    counts_N: np.ndarray
    kept_mass_N: dict[float, np.ndarray]
    positions_R: np.ndarray
    entropy_R: dict[float, np.ndarray]
    ce_R: np.ndarray
    payload_R: np.ndarray


def sample_rows(reader: CacheReader, size: int = SAMPLED_ROWS) -> Sample:
    """At most about ``size`` rows of at most 32 shards, spread evenly; of a cache that has positions.

    Rows without a position have no means over positions, and are passed over.
    """
    filled = np.flatnonzero(reader.manifest.shards.column("positions"))
    numbers = filled[_spread(len(filled), SAMPLED_SHARDS)]
    rows = []
    for number in numbers.tolist():
        view = reader.shard(number)
        those = np.flatnonzero(view.num_positions)
        rows += [view.row(row) for row in those[_spread(len(those), -(-size // len(numbers)))].tolist()]
    targets = reader.targets(rows)
    kept_mass_N = {}
    for temperature in reader.temperatures:
        kept = torch.zeros(targets.num_positions)
        kept.index_add_(0, targets.position_index, targets.weights(temperature))
        kept_mass_N[temperature] = kept.numpy()
    positions_R = np.array([row.num_positions for row in rows])
    entropies_RT = np.array([row.entropy_sums for row in rows]) / positions_R[:, None]
    return Sample(
        rows=rows,
        targets=targets,
        counts_N=targets.counts.numpy(),
        kept_mass_N=kept_mass_N,
        positions_R=positions_R,
        entropy_R=dict(zip(reader.temperatures, entropies_RT.T, strict=True)),
        ce_R=np.array([row.ce_sum for row in rows]) / positions_R,
        payload_R=np.array([len(row.payload) for row in rows]) / positions_R,
    )


def _summary(sample: Sample) -> dict[str, Any]:
    """Means are over positions."""

    def mean(values_R: np.ndarray) -> float:
        return float(np.average(values_R, weights=sample.positions_R))

    return {
        "rows": len(sample.positions_R),
        "positions": int(sample.positions_R.sum()),
        "entries_per_position": _quantiles(sample.counts_N),
        "kept_mass": {
            str(t): {"mean": float(mass_N.mean()), **_quantiles(mass_N)}
            for t, mass_N in sample.kept_mass_N.items()
        },
        "entropy": {str(t): mean(entropy_R) for t, entropy_R in sample.entropy_R.items()},
        "cross_entropy": mean(sample.ce_R),
        "payload_bytes_per_position": mean(sample.payload_R),
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
