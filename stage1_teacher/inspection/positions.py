"""What the teacher thought at each position of some rows, from the kept entries and the rows' own sums.

    found = positions_of(rows, reader.targets(rows))
    found.entropy_N.mean(), found.is_label_N.mean()

A cache holds the teacher's entropy and cross-entropy as sums over a row, exactly, and the kept entries of each
position.  What these leave open of a row's sum is shared out: entropy as ``shared.sparse.entropies`` has it,
cross-entropy evenly over the positions whose label is not kept.  So the sum of a row is exact, and so is every
position whose distribution was kept whole.

N positions of R rows, E entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache import Row
from shared.sparse import SparseTargets
from shared.sparse.entropies import Floats, is_exact, shared_out


@dataclass(frozen=True, eq=False)
class Positions:
    """(N,) each, row after row, at temperature 1; nats.

    row_N       which row a position is of
    place_N     0 for an answer's first token
    entropy_N   of the teacher
    ce_N        the teacher's, with the answer's token
    top_prob_N  of its likeliest token
    is_label_N  whether that token is the answer's
    """

    row_N: npt.NDArray[np.int64]
    place_N: npt.NDArray[np.int64]
    entropy_N: Floats
    ce_N: Floats
    top_prob_N: Floats
    is_label_N: npt.NDArray[np.bool_]


def positions_of(rows: Sequence[Row], targets: SparseTargets) -> Positions | None:
    """None where temperature 1 was not captured: the sums are of other distributions then."""
    if 1.0 not in targets.temperatures:
        return None
    column = targets.temperatures.index(1.0)
    lengths = np.array([row.num_positions for row in rows], dtype=np.int64)
    row_N = np.repeat(np.arange(len(rows)), lengths)
    place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    labels_N = np.concatenate([row.answer_ids for row in rows]) if rows else np.zeros(0, np.int32)

    position_E = targets.position_index.numpy()
    logprobs_E = targets.logprobs.double().numpy()
    exact_E = is_exact(targets)
    num_positions = targets.num_positions

    def per_position(values_E: Floats) -> Floats:
        return np.bincount(position_E, values_E, num_positions).astype(np.float64)

    ce_sums_R = np.array([row.ce_sum for row in rows])
    entropy_N = targets.entropy[:, column].double().numpy()
    is_label_E = (targets.ids.numpy() == labels_N[position_E]) & exact_E
    known_N = per_position(np.where(is_label_E, -logprobs_E, 0.0))
    is_open_N = per_position(is_label_E.astype(float)) == 0
    ce_N = shared_out(known_N, is_open_N.astype(float), ce_sums_R, row_N)
    top_prob_N, top_id_N = (tensor.numpy() for tensor in targets.likeliest())
    return Positions(row_N, place_N, entropy_N, ce_N, top_prob_N.astype(np.float64), top_id_N == labels_N)


def top_entries(targets: SparseTargets, number: int) -> list[list[tuple[int, float]]]:
    """Of each position the likeliest kept ids and their probabilities, of equals the lowest id first."""
    probs = targets.logprobs.double().exp().tolist()
    ids, offsets = targets.ids.tolist(), targets.offsets.tolist()
    found = []
    for start, end in itertools.pairwise(offsets):
        entries = sorted(zip(ids[start:end], probs[start:end], strict=True), key=lambda one: -one[1])
        found.append(entries[:number])
    return found
