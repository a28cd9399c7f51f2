"""A sparse teacher as the loss sees it: masses, a constant, and perhaps a bucket for the rest.

Two shapes cover all policies and tail modes (docs/loss.md, "Sparse teachers"):

- *linear*: KD = total * lse(z) - sum_i mass_i z_i - spread * sum_v z_v + constant.  All sampled policies,
  and the tail modes ``renormalize``, ``drop`` and ``uniform``.
- *bucket*: a divergence between the kept entries plus one outcome for all other ids.  The tail mode
  ``ghost``, and every divergence but forward KL.  Merging outcomes makes it a lower bound of the dense one.

Linear teachers of the same positions add up, each with its share, to a linear teacher.  Buckets do not.  Masses that
are regrouped over another vocabulary stay linear, too; the constant is not known then, and zero stands for it.

N positions, E entries of all positions, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.errors import RecipeError
from shared.kd_loss.divergences import Divergence
from shared.recipes.policies import (
    TAIL_MODES,
    TAILS_OF_ANOTHER_VOCABULARY,
    ghost_of_several,
    tail_of_another_vocabulary,
)
from shared.sparse import MixedTargets, RegroupedTargets, SparseTargets, Targets

MIN_REST = 2.0**-24  # fp16 log-probabilities can sum to more than one; the rest never falls below this


@dataclass(frozen=True)
class TeacherRows:
    """What the loss knows of the teacher at N positions, at one temperature.

    Shapes   row_E, ids_E (E,) int64; mass_E (E,) at the entries
             total_N (N,) all mass; constant_N (N,) sum of p log p; entropy_N (N,)
             spread_N (N,) what every valid id gets besides, or None; rest_N (N,) the bucket's mass, or None
             factor_N (N,) of the divergence with a bucket, or None for one; of a linear teacher it is in its masses
             log_mass_E (E,) with a bucket, also of masses that underflow
    """

    row_E: Tensor
    ids_E: Tensor
    mass_E: Tensor
    total_N: Tensor
    constant_N: Tensor
    entropy_N: Tensor
    spread_N: Tensor | None = None
    rest_N: Tensor | None = None
    factor_N: Tensor | None = None
    log_mass_E: Tensor | None = None

    def weighed(self, factor_N: Tensor) -> TeacherRows:
        """The same, its divergence and its entropy times a factor of each position, 0 or above."""
        if self.rest_N is not None:
            return replace(self, entropy_N=self.entropy_N * factor_N, factor_N=factor_N)
        return replace(
            self,
            mass_E=self.mass_E * factor_N[self.row_E],
            total_N=self.total_N * factor_N,
            constant_N=self.constant_N * factor_N,
            entropy_N=self.entropy_N * factor_N,
            spread_N=None if self.spread_N is None else self.spread_N * factor_N,
        )


@dataclass(frozen=True)
class SparseTeacher:
    """All rows, and where the entries of each begin: ``offsets`` (N + 1,) int64."""

    rows: TeacherRows
    offsets: Tensor

    @functools.cached_property
    def _bounds(self) -> list[int]:
        return self.offsets.tolist()  # on a GPU this waits, so the kernel's path never asks

    def slice(self, start: int, stop: int) -> TeacherRows:
        """The rows from ``start`` to ``stop``, whose ``row_E`` begins at zero."""
        rows, first, last = self.rows, self._bounds[start], self._bounds[stop]
        return TeacherRows(
            row_E=rows.row_E[first:last] - start,
            ids_E=rows.ids_E[first:last],
            mass_E=rows.mass_E[first:last],
            total_N=rows.total_N[start:stop],
            constant_N=rows.constant_N[start:stop],
            entropy_N=rows.entropy_N[start:stop],
            spread_N=None if rows.spread_N is None else rows.spread_N[start:stop],
            rest_N=None if rows.rest_N is None else rows.rest_N[start:stop],
            factor_N=None if rows.factor_N is None else rows.factor_N[start:stop],
            log_mass_E=None if rows.log_mass_E is None else rows.log_mass_E[first:last],
        )


@dataclass(frozen=True)
class KdRows:
    """KD per position and its gradient: scale * row + constant, and ``entry_E`` added at the entries.

    Both are for logits that were divided by the temperature, without the factor T squared.  The row is the
    student's softmax; with a bucket it is the softmax of the ids without an entry alone, and zero at the others.

    Shapes   student_rest_N (N,), student_E (E,): with a bucket, the student's masses of it and of the entries
    """

    value_N: Tensor
    scale_N: Tensor
    entry_E: Tensor
    constant_N: Tensor | None = None
    student_rest_N: Tensor | None = None
    student_E: Tensor | None = None


def sparse_teacher(
    targets: Targets,
    *,
    temperature: float,
    divergence: Divergence,
    tail: str,
    num_vocab_ids: int,
    dtype: torch.dtype,
) -> SparseTeacher:
    """Bring sparse targets into the form of the loss.

    Raises   RecipeError         for an unknown tail mode, a divergence that sampled targets cannot give, or either of
                                 them that several teachers, or a teacher of another vocabulary, cannot give
             CacheMismatchError  for a temperature that was not captured
    """
    check_tail(tail)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "divergence": divergence,
        "tail": tail,
        "num_vocab_ids": num_vocab_ids,
        "dtype": dtype,
    }
    if isinstance(targets, SparseTargets):
        return _teacher_alone(targets, **settings)
    if isinstance(targets, RegroupedTargets):
        _require_regroupable(targets, divergence, tail)
        return _teacher_regrouped(targets, sparse_teacher(targets.source, **settings).rows)
    _require_linear(targets, divergence, tail)
    return _teachers_together(targets, [_teacher_alone(part, **settings).rows for part in targets.parts])


def check_tail(tail: str) -> None:
    """Raises RecipeError for an unknown tail mode."""
    if tail not in TAIL_MODES:
        raise RecipeError(f"tail {tail!r}: unknown; choose one of {', '.join(TAIL_MODES)}")


def _require_linear(targets: MixedTargets, divergence: Divergence, tail: str) -> None:
    """Only what is linear in the teacher adds up."""
    if divergence.kind != "forward_kl":
        raise RecipeError(
            f"divergence {divergence.kind} of a mix of {len(targets.parts)} caches: it is not linear in the teacher, "
            "so targets of several do not add up. Choose forward_kl"
        )
    cut_off = [part.policy.kind for part in targets.parts if not part.policy.is_sampled]
    if cut_off and tail == "ghost":
        raise RecipeError(ghost_of_several(cut_off[0]))


def _require_regroupable(targets: RegroupedTargets, divergence: Divergence, tail: str) -> None:
    """Only masses at entries move to other ids: what the teacher left out has no text."""
    if divergence.kind != "forward_kl":
        raise RecipeError(
            f"divergence {divergence.kind} of a teacher with another tokenizer: it is not linear in the teacher, and "
            "regrouped targets serve only losses that are. Choose forward_kl"
        )
    parts = targets.source.parts if isinstance(targets.source, MixedTargets) else (targets.source,)
    cut_off = [part.policy.kind for part in parts if not part.policy.is_sampled]
    if cut_off and tail not in TAILS_OF_ANOTHER_VOCABULARY:
        raise RecipeError(tail_of_another_vocabulary(cut_off[0], tail))


def _teacher_regrouped(targets: RegroupedTargets, source: TeacherRows) -> SparseTeacher:
    """KD is the cross-entropy with the masses: their entropy is not known, so no constant is subtracted."""
    row_E, mass_E = targets.position_index, targets.gathered(source.mass_E)
    total_N = sum_rows(mass_E, row_E, targets.num_positions)
    zero_N = torch.zeros_like(total_N)
    rows = TeacherRows(row_E, targets.ids.long(), mass_E, total_N, constant_N=zero_N, entropy_N=zero_N)
    return SparseTeacher(rows, targets.offsets)


def _teachers_together(targets: MixedTargets, teachers: Sequence[TeacherRows]) -> SparseTeacher:
    """The weighted mean of their KDs, term by term: its gradient is that of their mean distribution."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([one * share for one, share in zip(values, targets.shares, strict=True)]).sum(0)

    spread_N = None
    if any(one.spread_N is not None for one in teachers):
        spread_N = mean(
            torch.zeros_like(one.total_N) if one.spread_N is None else one.spread_N for one in teachers
        )
    rows = TeacherRows(
        row_E=targets.position_index,
        ids_E=targets.ids.long(),
        mass_E=targets.gathered([one.mass_E for one in teachers]),
        total_N=mean(one.total_N for one in teachers),
        constant_N=mean(one.constant_N for one in teachers),
        entropy_N=mean(one.entropy_N for one in teachers),
        spread_N=spread_N,
    )
    return SparseTeacher(rows, targets.offsets)


def _teacher_alone(
    targets: SparseTargets,
    *,
    temperature: float,
    divergence: Divergence,
    tail: str,
    num_vocab_ids: int,
    dtype: torch.dtype,
) -> SparseTeacher:
    # Masses near one, and what they leave of it, are told apart in fp64 only.
    wide_E = targets.weights(temperature, torch.float32 if targets.policy.is_sampled else torch.float64)
    row_E, mass_E = targets.position_index, wide_E.to(dtype)
    total_N = sum_rows(mass_E, row_E, targets.num_positions)
    kept = TeacherRows(row_E, targets.ids.long(), mass_E, total_N, constant_N=total_N, entropy_N=total_N)
    if not targets.policy.is_sampled:
        tail = "ghost" if divergence.kind != "forward_kl" else tail
        missing_N = (1 - sum_rows(wide_E, row_E, targets.num_positions)).to(dtype)
        num_rest_ids_N = num_vocab_ids - targets.offsets.diff()
        rows = _with_tail(kept, missing_N, num_rest_ids_N, tail=tail)
        if rows.rest_N is not None:
            rows = replace(rows, log_mass_E=targets.log_masses(temperature, torch.float64).to(dtype))
        return SparseTeacher(rows, targets.offsets)
    if divergence.kind != "forward_kl":
        raise RecipeError(
            f"divergence {divergence.kind}: targets of the sampled policy {targets.policy.kind!r} serve only "
            f"losses that are linear in the teacher. Choose forward_kl, or a cache of a deterministic policy "
            f"(top_k, top_p)"
        )
    entropy_N = targets.entropy[:, targets.temperatures.index(temperature)].to(dtype)
    return SparseTeacher(replace(kept, constant_N=-entropy_N, entropy_N=entropy_N), targets.offsets)


def _with_tail(kept: TeacherRows, missing_N: Tensor, num_rest_ids_N: Tensor, *, tail: str) -> TeacherRows:
    """Give the mass that a truncated teacher leaves out to where the tail mode wants it."""
    num_positions = kept.total_N.shape[0]
    if tail == "renormalize":
        has_mass_N = kept.total_N > 0  # a row without any says nothing: its total stays zero
        mass_E = kept.mass_E / torch.where(has_mass_N, kept.total_N, 1)[kept.row_E]
        kept = replace(kept, mass_E=mass_E, total_N=has_mass_N.to(kept.total_N.dtype))
    negentropy_N = sum_rows(torch.xlogy(kept.mass_E, kept.mass_E), kept.row_E, num_positions)
    if tail in ("drop", "renormalize"):
        return replace(kept, constant_N=negentropy_N, entropy_N=-negentropy_N)
    rest_N = missing_N.clamp_min(MIN_REST) * (num_rest_ids_N > 0)
    if tail == "ghost":
        negentropy_N = negentropy_N + torch.xlogy(rest_N, rest_N)
        return replace(kept, rest_N=rest_N, constant_N=negentropy_N, entropy_N=-negentropy_N)
    spread_N = rest_N / num_rest_ids_N.clamp_min(1)
    negentropy_N = negentropy_N + torch.xlogy(rest_N, spread_N)
    return replace(
        kept,
        mass_E=kept.mass_E - spread_N[kept.row_E],
        total_N=kept.total_N + rest_N,
        constant_N=negentropy_N,
        entropy_N=-negentropy_N,
        spread_N=spread_N,
    )


def linear_kd(teacher: TeacherRows, logq_E: Tensor, all_logq_N: Tensor) -> KdRows:
    """KD that is linear in the student's log-probabilities.

    Shapes   logq_E (E,) of the entries; all_logq_N (N,) summed over all valid ids, used where the teacher
             spreads mass
    """
    terms_E = torch.where(teacher.mass_E != 0, teacher.mass_E * logq_E, 0)  # 0 * inf is 0
    value_N = teacher.constant_N - sum_rows(terms_E, teacher.row_E, len(teacher.total_N))
    spread_N = teacher.spread_N
    if spread_N is None:
        return KdRows(value_N, teacher.total_N, -teacher.mass_E)
    value_N = value_N - torch.where(spread_N > 0, spread_N * all_logq_N, 0)
    return KdRows(value_N, teacher.total_N, -teacher.mass_E, -spread_N)


def bucket_kd(teacher: TeacherRows, logq_E: Tensor, log_rest_N: Tensor, divergence: Divergence) -> KdRows:
    """A divergence over the kept entries and one bucket.

    The gradient does not change when a multiple of q is taken from the slopes.  The multiple that makes the
    slope of the likeliest outcome zero leaves sums of small numbers only, however sure the student is.

    Shapes   logq_E (E,) the student's log-probabilities of the entries; log_rest_N (N,) of all other ids
    """
    assert teacher.rest_N is not None
    assert teacher.log_mass_E is not None
    row_E, num_positions = teacher.row_E, len(log_rest_N)
    terms_E, slopes_E = divergence.terms(teacher.log_mass_E, logq_E)
    rest_terms_N, rest_slopes_N = divergence.terms(teacher.rest_N.log(), log_rest_N)
    q_E, rest_q_N = logq_E.exp(), log_rest_N.exp()
    top_N = torch.maximum(row_maximum(q_E, row_E, num_positions), rest_q_N)
    rest_is_top_N = rest_q_N == top_N
    ratio_E = torch.where(q_E == top_N[row_E], slopes_E / q_E, -torch.inf)
    ratio_N = row_maximum(ratio_E, row_E, num_positions)  # of several likeliest ones, any
    ratio_N = torch.where(rest_is_top_N, rest_slopes_N / rest_q_N, ratio_N)
    slopes_E = torch.where(ratio_E == ratio_N[row_E], 0, slopes_E - ratio_N[row_E] * q_E)
    rest_slopes_N = torch.where(rest_is_top_N, 0, rest_slopes_N - ratio_N * rest_q_N)
    slope_sum_N = sum_rows(slopes_E, row_E, num_positions) + rest_slopes_N
    factor_N = torch.ones_like(rest_q_N) if teacher.factor_N is None else teacher.factor_N
    return KdRows(
        value_N=torch.where(
            factor_N != 0, (sum_rows(terms_E, row_E, num_positions) + rest_terms_N) * factor_N, 0
        ),
        scale_N=(rest_slopes_N - rest_q_N * slope_sum_N) * factor_N,
        entry_E=(slopes_E - q_E * slope_sum_N[row_E]) * factor_N[row_E],
        student_rest_N=rest_q_N,
        student_E=q_E,
    )


def sum_rows(values_E: Tensor, row_E: Tensor, num_positions: int) -> Tensor:
    """Sums (N,) over each position's entries."""
    return values_E.new_zeros(num_positions).index_add_(0, row_E, values_E)


def row_maximum(values_E: Tensor, row_E: Tensor, num_positions: int) -> Tensor:
    """The largest (N,) of each position's entries; -inf where there is none."""
    lowest_N = values_E.new_full((num_positions,), -torch.inf)
    return lowest_N.scatter_reduce_(0, row_E, values_E, "amax")
