"""Where two tokenizations of the same answers both have a boundary.

    alignment = align(vocabulary, of_teacher, of_student)
    alignment.teacher_N         # for each position of the student the teacher's, or -1

A boundary is a number of bytes from the answer's beginning.  At a shared one, both models have read the same text and
say what comes next.  The end of the turn begins behind the answer's last byte in both.

There, the teacher's token of the answer stands for the student's, even where that one goes on beyond it: teacher and
label then mean one id.  Every other id goes where its text begins.

Legend: N positions of the student, S entries of the teacher's targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from shared.data.processing import Learned
from shared.other_vocabulary.vocabulary_map import AS_IS, NO_ID, WITH_BLANK, WITHOUT_BLANK, VocabularyMap
from shared.sparse import MixedTargets, RegroupedTargets, SparseTargets, regroup

NO_POSITION = -1


@dataclass(frozen=True, eq=False)
class Alignment:
    """Of an example's positions, all its answers one after the other.

    num_teacher_positions  that the teacher's row must have
    num_unlike             answers whose two texts differ: labels alone are learned of them
    Shapes   teacher_N (N,) int64, -1 for a position without; lead_N (N,) int64, as ``VocabularyMap`` has them
             label_N, their_label_N (N,) int64: the student's id, and the teacher's there; -1 for a position without
    """

    teacher_N: np.ndarray
    lead_N: np.ndarray
    label_N: np.ndarray
    their_label_N: np.ndarray
    num_teacher_positions: int
    num_unlike: int = 0

    @staticmethod
    def joined(parts: Sequence[Alignment]) -> Alignment:
        """One behind the other, as their rows' targets are."""
        before = [0, *accumulate(part.num_teacher_positions for part in parts)]
        moved = [
            np.where(part.teacher_N < 0, NO_POSITION, part.teacher_N + first)
            for part, first in zip(parts, before, strict=False)
        ]
        nothing = np.zeros(0, np.int64)
        lead_N, label_N, their_label_N = (
            np.concatenate([nothing, *(getattr(part, name) for part in parts)])
            for name in ("lead_N", "label_N", "their_label_N")
        )
        return Alignment(
            np.concatenate([nothing, *moved]),
            lead_N,
            label_N,
            their_label_N,
            before[-1],
            num_unlike=sum(part.num_unlike for part in parts),
        )


@dataclass(frozen=True)
class Coverage:
    """How much of a student's labels has targets; sums, which add up.

    positions, shared  all of the student's, and those of them with targets
    kept, mapped       weight of the teacher's entries there, and of those of them that have an id of the student;
                       at temperature 1, or the first that was captured
    """

    positions: float = 0.0
    shared: float = 0.0
    kept: float = 0.0
    mapped: float = 0.0

    def __add__(self, other: Coverage) -> Coverage:
        pairs = zip(self.values(), other.values(), strict=True)
        return Coverage(*(own + theirs for own, theirs in pairs))

    def values(self) -> tuple[float, float, float, float]:
        return self.positions, self.shared, self.kept, self.mapped

    @property
    def share_of_positions(self) -> float:
        return self.shared / self.positions if self.positions else 0.0

    @property
    def share_of_mass(self) -> float:
        return self.mapped / self.kept if self.kept else 0.0

    def to_json(self) -> dict[str, float]:
        """As logs and results have it; 0 to 1."""
        return {"shared_positions": self.share_of_positions, "shared_mass": self.share_of_mass}

    def text(self) -> str:
        shared, mapped = f"{self.share_of_positions:.1%}", f"{self.share_of_mass:.1%}"
        return f"{shared} of positions are shared, {mapped} of the teacher's mass there has an id"


def align(
    vocabulary: VocabularyMap,
    teacher: Sequence[Learned],
    student: Sequence[Learned],
    *,
    ends: tuple[int, int],
) -> Alignment:
    """Of the answers of one example, as both have them; both have as many.

    ends   the ids of the teacher and of the student that end a turn
    """
    parts = []
    for theirs, own in zip(teacher, student, strict=True):
        teacher_N, lead_N, is_alike = _align(vocabulary, theirs, own)
        their_ids = np.array([*theirs.labels(ends[0]), NO_ID], np.int64)  # the last one for no position
        parts.append(
            Alignment(
                teacher_N,
                lead_N,
                label_N=np.array(own.labels(ends[1]), np.int64),
                their_label_N=their_ids[teacher_N],
                num_teacher_positions=theirs.num_positions,
                num_unlike=int(not is_alike),
            )
        )
    return Alignment.joined(parts)


def _align(
    vocabulary: VocabularyMap, teacher: Learned, student: Learned
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Positions and leads, as an ``Alignment`` has them, and whether the two texts are alike.

    They are where they say the same as far as both go: an answer may be cut.  Blanks and line ends around it, which
    one of them may have otherwise, do not count.
    """
    teacher_N = np.full(student.num_positions, NO_POSITION, np.int64)
    lead_N = np.full(student.num_positions, AS_IS, np.int64)
    theirs, own = vocabulary.teacher.each(teacher.ids), vocabulary.student.each(student.ids)
    if theirs is None or own is None:
        return teacher_N, lead_N, False
    head, body, tail = _split(b"".join(theirs))
    own_head, own_body, own_tail = _split(b"".join(own))
    is_cut = not (teacher.is_ended and student.is_ended)
    if body != own_body and not (is_cut and (body.startswith(own_body) or own_body.startswith(body))):
        return teacher_N, lead_N, False
    text, own_text = body + tail, own_body + own_tail
    differing = (place for place, (a, b) in enumerate(zip(text, own_text, strict=False)) if a != b)
    num_same = next(differing, min(len(text), len(own_text)))
    begins = {begin - len(head): place for place, begin in enumerate(_begins(theirs, teacher))}
    own_begins = [begin - len(own_head) for begin in _begins(own, student)]
    for place, begin in enumerate(own_begins):
        if begin < num_same or text == own_text:  # both go on alike, or end
            teacher_N[place] = begins.get(begin, NO_POSITION)
    if head != own_head:  # which only the first tokens can differ in
        teacher_N[np.array(own_begins, np.int64) < 0] = NO_POSITION
        has_first = len(teacher_N) > 0 and teacher.num_positions > 0
        if {head, own_head} == {b"", b" "} and has_first and teacher_N[0] == NO_POSITION:
            teacher_N[0] = 0  # both begin here, and a blank more or less can be allowed for
            lead_N[0] = WITHOUT_BLANK if head else WITH_BLANK
    return teacher_N, lead_N, True


def _split(text: bytes) -> tuple[bytes, bytes, bytes]:
    """In three: what ``str.strip`` removes at either end of a row's answer, and ids may say, and what is left."""
    whole = text.decode(errors="surrogateescape")
    rest = whole.lstrip()
    body = rest.rstrip()
    parts = (whole[: len(whole) - len(rest)], body, rest[len(body) :])
    head, middle, tail = (part.encode(errors="surrogateescape") for part in parts)
    return head, middle, tail


def _begins(tokens: Sequence[bytes], answer: Learned) -> list[int]:
    """Where each token begins, and the end of the turn, in bytes."""
    found = [0, *accumulate(map(len, tokens))]
    return found if answer.is_ended else found[:-1]


def regrouped(
    targets: SparseTargets | MixedTargets, alignment: Alignment, vocabulary: VocabularyMap
) -> tuple[RegroupedTargets, Coverage]:
    """The teacher's targets at the student's positions and ids, and how much that covers."""
    assert targets.num_positions == alignment.num_teacher_positions
    is_shared = alignment.teacher_N >= 0
    source = targets.select(torch.from_numpy(alignment.teacher_N[is_shared]))
    lead_S = alignment.lead_N[is_shared][source.position_index.numpy()]
    ids_S = vocabulary.first_ids(source.ids.numpy(), lead_S)
    label_S, their_label_S = (
        of_each[is_shared][source.position_index.numpy()]
        for of_each in (alignment.label_N, alignment.their_label_N)
    )
    ids_S = np.where(source.ids.numpy() == their_label_S, label_S, ids_S)
    found = regroup(
        source,
        torch.from_numpy(ids_S),
        torch.from_numpy(is_shared),
        torch.from_numpy(alignment.label_N),
    )
    return found, _coverage(source, torch.from_numpy(ids_S != NO_ID), alignment)


def _coverage(source: SparseTargets | MixedTargets, is_mapped_S: Tensor, alignment: Alignment) -> Coverage:
    temperature = 1.0 if 1.0 in source.temperatures else source.temperatures[0]
    weights_S = source.weights(temperature).double()
    return Coverage(
        positions=float(len(alignment.teacher_N)),
        shared=float(source.num_positions),
        kept=weights_S.sum().item(),
        mapped=(weights_S * is_mapped_S).sum().item(),
    )
