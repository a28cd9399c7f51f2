"""Windows of a unit's examples, encoded in worker processes ahead of the model.

A unit is claimed when the loader asks for its first window, so that its pictures are decoded while the model
is at work on the unit before.  Batches are made within a window: the rows of a shard then never depend on
which other units its process has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from shared.capture.planning import NumberedRows
from shared.capture.units import Refused
from shared.data.collation import Encoded
from shared.data.loading import PackedDataset, begin_worker, loaded_items
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.data.unseen import encoded_twice
from shared.errors import DataError, TeachonceError, TrainingError, is_out_of_memory
from shared.model_check import usable
from shared.recipes.policies import VisualGain

WINDOW = 64  # examples; at most so many decoded pictures are held by each worker


class Unit(Protocol):
    """Examples that are claimed together: their keys, and the numbers of their rows over all splits."""

    @property
    def unit_id(self) -> str: ...

    @property
    def keys(self) -> Sequence[bytes]: ...

    @property
    def rows(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Window:
    """Some examples of one unit, in its order."""

    unit_id: str
    keys: tuple[bytes, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class EncodedWindow:
    unit_id: str
    encoded: list[Encoded]
    refused: list[Refused]
    names: list[str]  # of the encoded ones


class WindowSource(Dataset):
    """Encodes the examples of a window.

    section  of the recipe, whose ``num_workers`` are named where memory does not suffice
    asks     prompts without their last answers
    unseen   what becomes of the pictures in the teacher's second pass; None: there is none
    """

    def __init__(
        self,
        rows: NumberedRows,
        processor: ExampleProcessor,
        *,
        section: str = "cache",
        asks: bool = False,
        unseen: VisualGain | None = None,
    ) -> None:
        self.rows = rows
        self.processor = processor
        self.section = section
        self.asks = asks
        self.unseen = unseen

    def __getitem__(self, window: Window) -> EncodedWindow | TeachonceError:
        encoded: list[Encoded] = []
        refused: list[Refused] = []
        names: list[str] = []
        for key, number in zip(window.keys, window.numbers, strict=True):
            split, row = self.rows.find(number)
            try:
                example = split[row]
                one = self._encoded(example)
            except DataError as error:
                refused.append(Refused(key, self.rows.name(number), str(error)))
                continue
            except TeachonceError as error:  # as a value: the loader would wrap it in a worker's traceback
                return error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return TrainingError(
                    f"{split.where(row)}: a data-loader worker has not enough memory to read it. Lower "
                    f"{self.section}.num_workers or data.max_pixels, or take the row out"
                )
            if one.key != key:
                return DataError(f"{split.where(row)}: changed since it was first read; start again")
            encoded.append(one)
            names.append(split.where(row))
        return EncodedWindow(window.unit_id, encoded, refused, names)

    def _encoded(self, example: Example) -> Encoded:
        if self.asks:
            return self.processor.encode_prompt(example)
        return encoded_twice(self.processor, example, self.unseen)

    def usable(self) -> Iterator[Encoded]:
        """As ``model_check.usable``, of all splits."""
        rows = ((split, row) for split in self.rows.splits for row in range(len(split)))
        return usable(rows, self.processor)


def encoded_windows(
    source: WindowSource, units: Iterable[Unit], *, num_workers: int
) -> Iterator[EncodedWindow]:
    """The windows of the units, in order.

    Raises   TeachonceError  a row's own error, or that a worker died
    """
    setting = f"{source.section}.num_workers"
    loader: DataLoader = DataLoader(
        PackedDataset(source, workers_setting=setting) if num_workers else source,
        sampler=windows_of(units),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=begin_worker,
    )
    yield from loaded_items(loader, workers_setting=setting)


def windows_of(units: Iterable[Unit]) -> Iterator[Window]:
    for unit in units:
        keys = tuple(unit.keys)
        for start in range(0, len(keys), WINDOW):
            part = slice(start, start + WINDOW)
            yield Window(unit.unit_id, keys[part], tuple(map(int, unit.rows[part])))


def lengths_of(encoded: list[Encoded]) -> list[int]:
    return [len(one.input_ids) for one in encoded]
