"""What peers store for a student: records of one size for each position, found by the key of their example.

    method.prepare(recipe, world, folder)                 the teacher runs once over the training rows
    lesson = method.open(recipe, inputs, world, folder)   for a training

A folder holds ``positions.safetensors``: columns, and where the positions of each key begin.  What a method keeps
once for all positions, as the teacher's head, is in ``once.safetensors``.  A folder appears whole, and is made anew
where the teacher's weights, the rows or the method are others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.recipes import Recipe
from shared.runtime import World
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from stage2_student.training.feed import Microbatch
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.student import Forwarded
from tests.benchmarks.peers.method import Lesson
from tests.benchmarks.student_measures import one_pass

POSITIONS, ONCE = "positions.safetensors", "once.safetensors"
KEYS, OFFSETS = "keys", "offsets"


class Store:
    """A folder, opened; columns are read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._file = safe_open(folder / POSITIONS, "pt")
        once = load_file(folder / ONCE) if (folder / ONCE).exists() else {}
        # Not the file's pages, which would count once more when they are first read.
        self.once: dict[str, Tensor] = {name: one.clone() for name, one in once.items()}
        keys = self._file.get_tensor(KEYS).numpy()
        self._place = {key.tobytes(): place for place, key in enumerate(keys)}
        self._offsets: list[int] = self._file.get_tensor(OFFSETS).tolist()
        self.columns = sorted(set(self._file.keys()) - {KEYS, OFFSETS})
        self.bytes_per_position = (folder / POSITIONS).stat().st_size / self._offsets[-1]
        self.once_bytes = (folder / ONCE).stat().st_size if self.once else 0

    @property
    def identity(self) -> dict[str, str]:
        found: dict[str, str] = self._file.metadata()
        return found

    def read(self, keys: np.ndarray) -> dict[str, Tensor]:
        """The columns of these examples' positions, one after the other."""
        places = [self._place[key.tobytes()] for key in keys]
        spans = [slice(*self._offsets[place : place + 2]) for place in places]
        slices = {name: self._file.get_slice(name) for name in self.columns}
        return {name: torch.cat([column[span] for span in spans]) for name, column in slices.items()}

    @staticmethod
    def write(
        folder: Path,
        keys: np.ndarray,
        lengths: Sequence[int],
        columns: dict[str, Tensor],
        *,
        once: dict[str, Tensor],
        identity: dict[str, str],
    ) -> None:
        """``lengths``: positions of each key; in the place of what the folder held before."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        placed = {KEYS: torch.from_numpy(keys.copy()), OFFSETS: torch.from_numpy(offsets)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            save_file(columns | placed, new / POSITIONS, metadata=identity)
            if once:
                save_file(once, new / ONCE)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(new, folder)


class StoredMethod(ABC):
    """A way to teach from such a folder; subclasses are frozen dataclasses of the method's settings."""

    @abstractmethod
    def columns(self, teacher: Teacher, hidden_ND: Tensor) -> dict[str, Tensor]:
        """What is stored of N positions, each (N, ...), of the teacher's hidden states there."""

    @abstractmethod
    def targets(self, columns: dict[str, Tensor]) -> Any:
        """What a microbatch gets for targets, of what was stored."""

    def once(self, teacher: Teacher) -> dict[str, Tensor]:
        """What is stored once, and is in memory in training."""
        return {}

    def forward(self, once: dict[str, Tensor]) -> Callable[..., Forwarded] | None:
        """In the place of the student's own; None: that one, with sparse targets."""
        return None

    def prepare(self, recipe: Recipe, world: World, folder: Path) -> None:
        """Stores the training rows; nothing is done where the folder holds them."""
        assert recipe.teacher is not None
        inputs = open_inputs(recipe, world)
        num_ids = inputs.processor.num_token_ids
        teacher = load_teacher(recipe.teacher, num_token_ids=num_ids, world=world)
        assert teacher.weights_fingerprint is not None
        rows = inputs.train
        identity = {
            "method": repr(self),
            "teacher": teacher.weights_fingerprint,
            "rows": rows.fingerprint,
        }
        if folder.exists() and Store(folder).identity == identity:
            return
        parts: dict[str, list[Tensor]] = defaultdict(list)
        examples: list[int] = []
        lengths: list[int] = []
        with torch.inference_mode():
            for one in one_pass(rows, inputs.training_source()):
                examples += one.slot.examples
                lengths += one.lengths
                for name, column in self.columns(teacher, teacher.hidden(one)).items():  # type: ignore[arg-type]
                    parts[name].append(column)
            columns = {name: torch.cat(some) for name, some in parts.items()}
            once = self.once(teacher)
        Store.write(folder, rows.keys[examples], lengths, columns, once=once, identity=identity)

    def open(self, recipe: Recipe, inputs: Inputs, world: World, folder: Path) -> Lesson:
        store, keys = Store(folder), inputs.train.keys

        def read(microbatch: Microbatch) -> Microbatch:
            columns = store.read(keys[list(microbatch.slot.examples)])
            return replace(microbatch, targets=self.targets(columns))

        return Lesson(
            read=read,
            forward=self.forward(store.once),
            bytes_per_position=store.bytes_per_position,
            once_bytes=store.once_bytes,
            held_bytes=sum(one.numel() * one.element_size() for one in store.once.values()),
        )
