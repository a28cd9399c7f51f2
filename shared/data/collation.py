"""Examples of one model become a padded batch; the shift rule lives here alone.

    batch = collated(encoded, pad_id=tokenizer.pad_token_id)
    hidden = model(**batch.inputs).last_hidden_state                    # (B, S, D)
    predicting = hidden.flatten(0, 1)[batch.position_index]             # (N, D), one row for each label

Legend: B examples, S padded length, N labels of the batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from shared.errors import DataError

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example, ready for collation.

    Shapes   input_ids, labels (S,) int64; labels are -100 wherever nothing is to be learned
             model_inputs: what else the model is fed; what is there for each token has shape (S,)
    """

    key: bytes
    input_ids: Tensor
    labels: Tensor
    model_inputs: dict[str, Tensor]
    num_positions: int
    truncated: bool

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

    Raises   DataError  when the pictures' tensors do not fit together.
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


def _predicting(one: Encoded) -> Tensor:
    """The shift rule: the label at t belongs to the hidden state at t - 1."""
    return (one.labels != IGNORE_INDEX).nonzero()[:, 0] - 1


def _padded(encoded: Sequence[Encoded], starts: list[int], length: int, pad_id: int) -> dict[str, Tensor]:
    """What there is for each token, (B, S): ids padded with ``pad_id``, all else with 0."""
    rows = [
        {"input_ids": one.input_ids, "attention_mask": torch.ones_like(one.input_ids)}
        | {name: value for name, value in one.model_inputs.items() if _is_per_token(value, one)}
        for one in encoded
    ]
    padded = {}
    for name, first in rows[0].items():
        padded[name] = first.new_full((len(rows), length), pad_id if name == "input_ids" else 0)
        for row, (start, values) in enumerate(zip(starts, rows, strict=True)):
            padded[name][row, start : start + len(values[name])] = values[name]
    return padded


def _joined(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """What there is for each picture, joined along the first axis, as models take it."""
    first = encoded[0]
    names = [name for name, value in first.model_inputs.items() if not _is_per_token(value, first)]
    try:
        return {name: torch.cat([one.model_inputs[name] for one in encoded]) for name in names}
    except RuntimeError as error:
        raise DataError(
            f"pictures of different sizes do not fit into one batch of this model ({error}); "
            "set microbatch_size to 1"
        ) from error


def _is_per_token(value: Tensor, one: Encoded) -> bool:
    return value.shape == one.input_ids.shape
