"""Examples of one model become a padded batch; the shift rule lives here alone.

    batch = collated(encoded, pad_id=tokenizer.pad_token_id)
    hidden = model(**batch.inputs).last_hidden_state                    # (B, S, D)
    predicting = hidden.flatten(0, 1)[batch.position_index]             # (N, D), one row for each label

Legend: B examples, S padded length, N labels of the batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch import Tensor

from shared.errors import DataError

IGNORE_INDEX = -100
CROSS_ATTENTION = "cross_attention_mask"  # of the pictures that each token may see


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example, ready for collation.

    Shapes   input_ids, labels (S,) int64; labels are -100 wherever nothing is to be learned
             per_token: what else there is for each token, (S, ...) each
             per_picture: what there is for the pictures, joined along the first axis; {} without pictures
    num_last  of the labels, those of the last answer; earlier answers of a conversation may have others
    unseen   the same example, its pictures blurred or removed, where a capture asks for it: see ``data.unseen``
    """

    key: bytes
    input_ids: Tensor
    labels: Tensor
    per_token: dict[str, Tensor]
    per_picture: dict[str, Tensor]
    num_positions: int
    truncated: bool
    num_last: int = 0
    unseen: Encoded | None = None

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """All that the model is fed beside the ids."""
        return self.per_token | self.per_picture

    @property
    def has_pictures(self) -> bool:
        """Whether the model is fed anything beside what there is for each token."""
        return bool(self.per_picture)

    def without_labels(self) -> Self:
        """As a model's input alone: nothing of it is learned, or counted."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_INDEX), num_positions=0, num_last=0)

    @property
    def answer_ids(self) -> Tensor:
        """(num_positions,) int64: the labels alone."""
        return self.labels[self.labels != IGNORE_INDEX]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded examples.

    Shapes   inputs: keyword arguments of the model's forward, without labels; input_ids (B, S) int64
             position_index (N,) int64: into B * S, the hidden state that predicts each label
             labels (N,) int64, example by example
             example_offsets (B + 1,) int64: labels of example b are [offsets[b], offsets[b + 1])
    """

    inputs: dict[str, Tensor]
    position_index: Tensor
    labels: Tensor
    example_offsets: Tensor
    keys: list[bytes]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Any) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("inputs", "keys")}
        moved = {name: move(tensor) for name, tensor in tensors.items()}
        return replace(self, inputs={name: move(t) for name, t in self.inputs.items()}, **moved)


def collated(
    encoded: Sequence[Encoded], *, pad_id: int, padding_side: Literal["left", "right"] = "right"
) -> Batch:
    """Pads and joins; what a model computes for an example does not depend on its companions or the side.

    Raises   DataError  when the pictures' tensors have different numbers of axes
    """
    length = max(len(one.input_ids) for one in encoded)
    starts = [length - len(one.input_ids) if padding_side == "left" else 0 for one in encoded]
    index = [
        row * length + start + _predicting(one)
        for row, (start, one) in enumerate(zip(starts, encoded, strict=True))
    ]
    counts = torch.tensor([0, *(one.num_positions for one in encoded)])
    return Batch(
        inputs=_padded(encoded, starts, length, pad_id) | _joined(encoded),
        position_index=torch.cat(index),
        labels=torch.cat([one.answer_ids for one in encoded]),
        example_offsets=counts.cumsum(0),
        keys=[one.key for one in encoded],
    )


def packed(encoded: Sequence[Encoded]) -> Batch:
    """Joins the examples in one row, one behind the other, for models that keep them apart (``models.packing``).

    Shapes   S is the sum of their lengths and the first axis of ``input_ids`` 1; ``position_ids`` (1, S) int64
             begin from 0 in each example, and there is no ``attention_mask``
    """
    lengths = [len(one.input_ids) for one in encoded]
    starts = [0, *accumulate(lengths[:-1])]
    counts = torch.tensor([0, *(one.num_positions for one in encoded)])
    positions = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    return Batch(
        inputs=_in_one_row(encoded) | positions | _joined(encoded),
        position_index=torch.cat(
            [start + _predicting(one) for start, one in zip(starts, encoded, strict=True)]
        ),
        labels=torch.cat([one.answer_ids for one in encoded]),
        example_offsets=counts.cumsum(0),
        keys=[one.key for one in encoded],
    )


def _predicting(one: Encoded) -> Tensor:
    """The shift rule: the label at t belongs to the hidden state at t - 1."""
    return (one.labels != IGNORE_INDEX).nonzero()[:, 0] - 1


def places_of(labels: Tensor) -> list[int]:
    """Of each label of one example its place in its answer, from 0; an answer ends where labels do."""
    places: list[int] = []
    previous = -1
    for index in (labels != IGNORE_INDEX).nonzero()[:, 0].tolist():
        places.append(places[-1] + 1 if places and index == previous + 1 else 0)
        previous = index
    return places


def _padded(encoded: Sequence[Encoded], starts: list[int], length: int, pad_id: int) -> dict[str, Tensor]:
    """What there is for each token, (B, S, ...): ids padded with ``pad_id``, all else with 0."""
    rows = [
        {"input_ids": one.input_ids, "attention_mask": torch.ones_like(one.input_ids)} | one.per_token
        for one in encoded
    ]
    padded = {}
    for name, values in _by_name(rows).items():
        found = [value for value in values if value is not None]
        trailing = _largest(name, [value.shape[1:] for value in found])
        fill = pad_id if name == "input_ids" else 0
        padded[name] = found[0].new_full((len(rows), length, *trailing), fill)
        for row, (start, value) in enumerate(zip(starts, values, strict=True)):
            if value is not None:
                padded[name][row, start : start + len(value)] = _grown(value, trailing)
    return padded


def _in_one_row(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """What there is for each token, (1, S, ...); zeros for an example that has it not."""
    joined = {}
    for name, values in _by_name([{"input_ids": one.input_ids} | one.per_token for one in encoded]).items():
        found = [value for value in values if value is not None]
        trailing = _largest(name, [value.shape[1:] for value in found])
        parts = [
            found[0].new_zeros(len(one.input_ids), *trailing) if value is None else _grown(value, trailing)
            for one, value in zip(encoded, values, strict=True)
        ]
        joined[name] = torch.cat(parts)[None]
    return joined


def _joined(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """What there is for pictures, joined along the first axis, the others padded with zeros to the largest.

    So families pad pictures of different sizes or numbers of tiles themselves, and say beside the pixels what is
    padding.  With cross-attention the first axis is that of examples: there, one without pictures has zeros.
    """
    by_example = any(CROSS_ATTENTION in one.per_token for one in encoded)
    joined = {}
    for name, values in _by_name([one.per_picture for one in encoded]).items():
        found = [value for value in values if value is not None]
        if by_example:
            found = [torch.zeros_like(found[0][:1]) if value is None else value for value in values]
        trailing = _largest(name, [value.shape[1:] for value in found])
        joined[name] = torch.cat([_grown(value, trailing) for value in found])
    return joined


def _by_name(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor | None]]:
    """Each name's values, one for each example; None where an example has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _largest(name: str, shapes: Sequence[torch.Size]) -> list[int]:
    """The size of each axis that holds all of the shapes."""
    if len({len(shape) for shape in shapes}) > 1:
        raise DataError(
            f"examples of one batch have {name} of {' and '.join(str(tuple(shape)) for shape in shapes)}, beside the "
            "first axis; this model's image processor must give pictures of any size the same number of axes"
        )
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def _grown(value: Tensor, trailing: list[int]) -> Tensor:
    """With zeros at the ends of its axes, but for the first."""
    if list(value.shape[1:]) == trailing:
        return value
    grown = value.new_zeros(len(value), *trailing)
    grown[(slice(None), *(slice(size) for size in value.shape[1:]))] = value
    return grown
