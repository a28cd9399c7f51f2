"""The questions of a split, each about the picture of another case: does a model look at its pictures at all?

    other = with_other_pictures(survey)      # the same questions and answers, in the same rows

A model that answers as well as before has learned what is asked and how it is mostly answered, and no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from shared.data.rows import Example, VqaSplit
from shared.errors import DataError
from stage2_student.training.survey import Survey

SEED = 0  # one shuffle for all models, so that they can be compared


@dataclass(frozen=True)
class ShuffledSplit(VqaSplit):
    """``picture_rows`` says, for each row that is read, whose picture it shows."""

    picture_rows: Mapping[int, int] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Example:
        """Raises   DataError  when the row, or one that lends a picture, cannot be used."""
        example = super().__getitem__(index)
        if not example.images:
            return example
        lent = super().__getitem__(self.picture_rows[index]).images
        return replace(example, images=tuple(lent[n % len(lent)] for n in range(len(example.images))))


def with_other_pictures(survey: Survey) -> Survey:
    """The survey's examples with their pictures dealt anew; no case keeps one of its own.

    A row of text alone stays as it is; one that shows more pictures than it is lent shows some twice.

    Raises   DataError  when there is but one case with pictures
    Holds    a function of the examples alone; pictures of one case are lent to one other case, in turn
    """
    split = survey.split
    rows_of_case: dict[str, list[int]] = {}
    for row in survey.rows.tolist():
        example = split[row]
        if not example.images:
            continue
        case = example.case or hashlib.sha256(b"".join(example.images)).hexdigest()
        rows_of_case.setdefault(case, []).append(row)
    cases = list(rows_of_case.values())
    if len(cases) < 2:
        raise DataError(
            f"{split.source}, split {split.name}: all {survey.num_examples} questions are about one case; "
            "shuffled pictures need two. Ask more of them"
        )
    order = np.random.default_rng(SEED).permutation(len(cases))
    picture_rows: dict[int, int] = {}
    for place, case in enumerate(order):
        lent = cases[order[(place + 1) % len(order)]]
        picture_rows |= {row: lent[number % len(lent)] for number, row in enumerate(cases[case])}
    own = {field.name: getattr(split, field.name) for field in fields(split)}
    return replace(survey, split=ShuffledSplit(**own, picture_rows=picture_rows))
