"""Microbatches, decoded in worker processes ahead of the step that needs them.

    for microbatches, wait_s in feed(source, slots_by_step, num_workers=2, pin_memory=False):

A worker reads the rows, makes tokens and pixels of them, reads their targets from the cache, and compares the
cache's answer with the student's own labels, row by row.  Its errors come back as values and are raised here
with the row's name; a worker that dies is an error too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, tee

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.cache import Cache, CacheMix, MixedRow, Row
from shared.data.collation import Encoded, packed, places_of
from shared.data.loading import PackedDataset, begin_worker, loaded_items
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.data.written import is_students
from shared.errors import (
    CacheMismatchError,
    DataError,
    TeachonceError,
    TrainingError,
    is_out_of_memory,
    listed,
)
from shared.model_check import usable
from shared.other_vocabulary import Aligned, Alignment, Coverage, StudentOfAnother, regrouped
from shared.sparse import Targets
from stage2_student.training.emphasis import Emphasis, Weighing
from stage2_student.training.order import Slot


@dataclass(frozen=True)
class Microbatch:
    """What a rank forwards at once.  N positions of B examples.

    lengths, kinds  positions and kind of question of each example
    places          of each position in its answer, from 0
    label_logprobs  (N,) fp32, the teacher's of labels that the student itself wrote, else NaN; None: not asked for
    """

    slot: Slot
    inputs: dict[str, Tensor]
    position_index: Tensor  # (N,) int64 into the flattened (B * S) hidden states
    labels: Tensor  # (N,) int64
    targets: Targets | None
    num_tokens: int  # without padding, of rows that count
    num_rows: int = 0  # so many of the first examples count
    lengths: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    weighing: Weighing | None = None  # how positions count in training; None: all alike
    teachers: tuple[str, ...] = ()  # of each example's targets, where the caches are of several
    teacher_ces: tuple[
        float, ...
    ] = ()  # with the labels, nats, summed over each example; as the cache has it
    places: tuple[int, ...] = ()
    has_pictures: bool = True
    refused: tuple[str, ...] = ()  # why rows are left out
    label_logprobs: Tensor | None = None
    coverage: Coverage | None = None  # by targets of the positions, with a teacher of another tokenizer

    @property
    def num_positions(self) -> int:
        return len(self.labels)

    @property
    def num_kept(self) -> int:
        """Positions that are trained on."""
        return self.num_positions if self.weighing is None else self.weighing.num_kept

    @property
    def teacher_ce(self) -> float:
        """Nats, summed over the positions."""
        return sum(self.teacher_ces)

    @property
    def num_forwarded(self) -> int:
        """Tokens, padding counted; 0 for an example that is forwarded for company alone."""
        return self.inputs["input_ids"].numel() if self.slot.counts else 0

    @property
    def cost(self) -> int:
        """The same, and what the pictures cost the tower, in tokens."""
        return self.num_forwarded + self.slot.picture_cost

    def to(self, device: torch.device) -> Microbatch:
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            position_index=self.position_index.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            weighing=self.weighing
            and self.weighing.each(lambda tensor: tensor.to(device, non_blocking=True)),
            label_logprobs=None
            if self.label_logprobs is None
            else self.label_logprobs.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Microbatch:
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            position_index=self.position_index.pin_memory(),
            labels=self.labels.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            weighing=self.weighing and self.weighing.each(Tensor.pin_memory),
            label_logprobs=None if self.label_logprobs is None else self.label_logprobs.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class _Used:
    """A row that is used.

    writer   the model that wrote its answer, as the row says
    aligned  its labels beside the teacher's, where there are targets and the teacher's tokenizer is another one
    """

    row: int
    encoded: Encoded
    kind: str
    writer: str
    aligned: Aligned | None

    @property
    def teacher_ids(self) -> list[int]:
        """The labels that the teacher must have been captured with."""
        ids: list[int] = self.encoded.answer_ids.tolist()
        return ids if self.aligned is None else self.aligned.teacher_ids


class MicrobatchSource(Dataset):
    """Makes the microbatch of a slot.

    rows           row of the split for each example: rows that cannot be used have been left out
    cache          None for labels alone
    needs_picture  other ranks' microbatches may have pictures: one without gets a blank one, in a row that counts
                   for nothing
    packing        examples follow each other in one row, instead of rows of their own
    may_drop       rows that cannot be used are left out of their microbatch, which says why; else one is an error
    emphasis       which positions count, and how much; None: all alike
    scores_own     also the teacher's log-probs of what the student wrote, which the cache then has
    """

    def __init__(
        self,
        split: VqaSplit,
        rows: np.ndarray,
        processor: ExampleProcessor,
        cache: Cache | None,
        *,
        needs_picture: bool = False,
        packing: bool = False,
        may_drop: bool = False,
        emphasis: Emphasis | None = None,
        scores_own: bool = False,
    ) -> None:
        self.split = split
        self.rows = rows
        self.processor = processor
        self.cache = cache
        self.needs_picture = needs_picture
        self.packing = packing
        self.may_drop = may_drop
        self.emphasis = emphasis
        self.scores_own = scores_own

    def __getitem__(self, slot: Slot) -> Microbatch | TeachonceError:
        rows = [int(self.rows[example]) for example in slot.examples]
        try:
            return self.microbatch(slot, rows)
        except TeachonceError as error:  # as a value: the loader would wrap it in a worker's traceback
            return error
        except Exception as error:
            if is_out_of_memory(error):
                return self._out_of_memory([slot], "a data-loader worker has not enough memory to read it")
            error.add_note(f"while reading {self.split.where(rows[0])} and the rest of its microbatch {rows}")
            raise

    def usable(self) -> Iterator[Encoded]:
        """As ``model_check.usable``, without targets."""
        return usable(((self.split, int(row)) for row in self.rows), self.processor)

    @contextmanager
    def naming_rows(self, microbatches: Sequence[Microbatch]) -> Iterator[None]:
        """Raises   TrainingError  with the rows of the largest microbatch, where memory does not suffice for them"""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            largest = max(microbatches, key=lambda one: one.num_forwarded)
            what = f"{largest.num_forwarded:,} tokens do not fit into memory together"
            raise self._out_of_memory([largest.slot], what) from error

    def _out_of_memory(self, slots: Sequence[Slot], what: str) -> TrainingError:
        names = [self.split.where(int(self.rows[one])) for slot in slots for one in slot.examples]
        return TrainingError(
            f"{what}:\n{listed(names)}\nLower optimization.microbatch_tokens (or microbatch_size) or "
            "data.max_pixels, set student.activation_checkpointing, or take a row that is far longer than others out"
        )

    def microbatch(self, slot: Slot, rows: list[int]) -> Microbatch:
        used, refused = self._usable(rows)
        encoded = [one.encoded if slot.counts else one.encoded.without_labels() for one in used]
        fed = [*encoded, *self._blank(encoded)]
        batch = packed(fed) if self.packing else self.processor.collate(fed)
        label_logprobs: Tensor | None = None
        cached: Sequence[Row | MixedRow] = ()
        if self.cache is not None and slot.counts:
            cached = self._cached(self.cache, used)
        targets, coverage = self._targets(cached, used if slot.counts else [])
        own_N = _own_positions(used if slot.counts else [])
        if self.cache is not None and self.scores_own:
            assert not isinstance(self.cache, CacheMix)  # which the recipe refuses
            label_logprobs = self.cache.label_log_probs(cached).masked_fill(~own_N, torch.nan)  # type: ignore[arg-type]  # its own rows
        lengths = tuple(one.num_positions for one in encoded)
        weighing = None
        if self.emphasis is not None:
            weighing = self.emphasis.weigh(self.cache, cached, targets, lengths, own_N)
        return Microbatch(
            slot=slot,
            inputs=batch.inputs,
            position_index=batch.position_index,
            labels=batch.labels,
            targets=targets,
            weighing=weighing,
            num_tokens=sum(len(one.input_ids) for one in encoded) if slot.counts else 0,
            num_rows=len(encoded) if slot.counts else 0,
            lengths=lengths,
            kinds=tuple(one.kind for one in used),
            places=tuple(place for one in encoded for place in places_of(one.labels)),
            refused=tuple(refused),
            teachers=self._teachers(cached),
            teacher_ces=tuple(row.ce_sum for row in cached),
            has_pictures=any(one.has_pictures for one in fed),
            label_logprobs=label_logprobs,
            coverage=coverage,
        )

    def _usable(self, rows: list[int]) -> tuple[list[_Used], list[str]]:
        """Those of the rows that can be used, and why others are left out."""
        used: list[_Used] = []
        refused: list[str] = []
        for row in rows:
            try:
                example = self.split[row]
                encoded, aligned = self.processor.encode(example), None
                if self.cache is not None and isinstance(self.processor, StudentOfAnother):
                    aligned = self.processor.aligned(example)
            except DataError as error:
                if not self.may_drop:
                    raise
                refused.append(str(error))
                continue
            used.append(_Used(row, encoded, example.kind, example.written_by, aligned))
        return used, refused

    def _targets(
        self, cached: Sequence[Row | MixedRow], used: Sequence[_Used]
    ) -> tuple[Targets | None, Coverage | None]:
        """Of rows of the cache; of a teacher with another tokenizer also how much of the positions that covers."""
        if self.cache is None:
            return None, None
        targets = self.cache.targets(cached)  # type: ignore[arg-type]  # its own rows
        if not isinstance(self.processor, StudentOfAnother):
            return targets, None
        alignments = [one.aligned.alignment for one in used if one.aligned is not None]
        return regrouped(targets, Alignment.joined(alignments), self.processor.vocabulary)

    def blank_microbatch(self, slot: Slot) -> Microbatch:
        """A picture and nothing that counts."""
        batch = self.processor.collate([self.processor.blank()])
        targets, _ = self._targets([], [])
        return Microbatch(slot, batch.inputs, batch.position_index, batch.labels, targets, num_tokens=0)

    def _blank(self, encoded: list[Encoded]) -> list[Encoded]:
        is_lacking = self.needs_picture and not any(one.has_pictures for one in encoded)
        return [self.processor.blank(with_picture=self.needs_picture)] if is_lacking or not encoded else []

    def _teachers(self, cached: Sequence[Row | MixedRow]) -> tuple[str, ...]:
        """Empty where there is one for all."""
        if self.cache is None or len(self.cache.teacher_names) == 1:
            return ()
        return tuple(self.cache.teachers([row.key for row in cached]))

    def _cached(self, cache: Cache, used: Sequence[_Used]) -> Sequence[Row | MixedRow]:
        names = [self.split.where(one.row) for one in used]
        cached: Sequence[Row | MixedRow] = cache.rows([one.encoded.key for one in used], names=names)
        for one, name, row in zip(used, names, cached, strict=True):
            if one.teacher_ids != row.answer_ids.tolist():
                raise CacheMismatchError(_different_answers(name, row.answer_ids.tolist(), one))
        return cached


def _own_positions(used: Sequence[_Used]) -> Tensor:
    """(N,) bool: whether the student wrote the label; of a row it wrote the last answer."""
    own_N = torch.zeros(sum(one.encoded.num_positions for one in used), dtype=torch.bool)
    end = 0
    for one in used:
        end += one.encoded.num_positions
        if is_students(one.writer):
            own_N[end - one.encoded.num_last : end] = True
    return own_N


def feed(
    source: MicrobatchSource,
    slots_by_step: Iterable[Sequence[Slot]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[list[Microbatch], float]]:
    """The microbatches of each step in turn, and the seconds that were spent waiting for them.

    Raises   TeachonceError  a row's own error, from whichever process met it
             TrainingError   when a worker process died
    """
    for_loader, for_steps = tee(slots_by_step)
    loader: DataLoader = DataLoader(
        PackedDataset(source, workers_setting="run.num_workers") if num_workers else source,
        sampler=chain.from_iterable(for_loader),  # lazy: a few steps ahead, however long the run
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=begin_worker,
    )
    microbatches = loaded_items(loader, workers_setting="run.num_workers")
    for slots in for_steps:
        begin = time.perf_counter()
        try:
            step = [next(microbatches) for _ in slots]
        except TrainingError as error:
            if "worker died" not in str(error):
                raise
            first = source.split.where(int(source.rows[slots[0].examples[0]]))
            raise TrainingError(f"{error}. {first} was waited for, or what is read after it") from error
        yield step, time.perf_counter() - begin


def _different_answers(where: str, cached: list[int], used: _Used) -> str:
    own, whose = used.teacher_ids, "student" if used.aligned is None else "teacher"
    pairs = zip(cached, own, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(own)))
    return (
        f"{where}: the cache holds an answer of {len(cached)} tokens, the {whose}'s labels are {len(own)}; "
        f"they differ from token {place} on ({cached[place : place + 4]} and {own[place : place + 4]}). The "
        f"tokenizers or templates differ; capture the cache with this {whose}'s"
    )
