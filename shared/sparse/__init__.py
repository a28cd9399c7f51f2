"""Sparse targets: what the cache keeps of a teacher's distributions, and how it is made from log-probs.

``SparseTargets`` is the one currency between capture, codec, reader and loss; ``sparsify`` makes it.  The
mathematics is derived in ``docs/targets.md``.
"""

from shared.sparse.draws import position_seeds
from shared.sparse.sparsifier import sampling_version, sparsify
from shared.sparse.targets import SparseTargets

__all__ = ["SparseTargets", "position_seeds", "sampling_version", "sparsify"]
