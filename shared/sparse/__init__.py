"""Sparse targets: what the cache keeps of a teacher's distributions, and how it is made from log-probs.

``SparseTargets`` is the one currency between capture, codec, reader and loss; ``sparsify`` makes it.  Between reader
and loss there may be ``MixedTargets``, the weighted sum of several teachers' targets, which ``mix`` makes, and
``RegroupedTargets``, of a teacher with another vocabulary, which ``regroup`` makes.  The mathematics is derived in
``docs/targets.md``.
"""

from shared.sparse.draws import position_seeds
from shared.sparse.mixture import MixedTargets, mix
from shared.sparse.regrouped import RegroupedTargets, regroup
from shared.sparse.sparsifier import sampling_version, sparsify
from shared.sparse.targets import SparseTargets

Targets = SparseTargets | MixedTargets | RegroupedTargets

__all__ = [
    "MixedTargets",
    "RegroupedTargets",
    "SparseTargets",
    "Targets",
    "mix",
    "position_seeds",
    "regroup",
    "sampling_version",
    "sparsify",
]
