"""A cache filled by a teacher loop of one's own, whatever runs the teacher there.

    with capture(recipe, processor, weights_fingerprint=weight_fingerprint(teacher)) as cache:
        for encoded in cache.batches(8):                       # what is missing, shard by shard
            batch = processor.collate(encoded)
            hidden_ND = ...                                    # of the batch's answer positions
            cache.add(encoded, hidden_ND, head=teacher.lm_head)

With ``cache.visual_gain`` in the recipe, also feed the teacher what of the examples has pictures without them
(``[one.unseen for one in encoded if one.unseen]``), and give ``add`` the outputs: ``unseen_nD=...``.

The cache is committed when the ``with`` block ends without an exception and nothing is missing.  However it
ends, finished shards stay, and the same loop goes on with the rest.  One process captures; the teacher
itself may be spread over as many GPUs as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shared.cache import (
    DataSource,
    Identity,
    InputsIdentity,
    TargetsIdentity,
    TeacherIdentity,
    Unit,
)
from shared.cache.index import as_key_array
from shared.capture.opening import Opened, open_planned
from shared.capture.planning import NumberedRows, identity_of, survey
from shared.capture.targets import AnsweredExample, label_gain, label_losses, rows_of, sparse_targets
from shared.capture.units import Refused, UnitCollector
from shared.data.collation import Encoded
from shared.data.fingerprints import tokenizer_fingerprint
from shared.data.processing import ExampleProcessor
from shared.data.unseen import encoded_twice
from shared.errors import DataError, RecipeError
from shared.recipes import Recipe, dump_recipe
from shared.recipes.policies import Policy, Threshold, VisualGain
from shared.runtime import environment
from shared.sparse import position_seeds
from shared.surveying import keys_fingerprint

Example = TypeVar("Example", bound=AnsweredExample, covariant=True)


class Examples(Protocol[Example]):
    """Anything with examples by number: a list, a map-style data set."""

    def __getitem__(self, number: int, /) -> Example: ...


class Capture(Generic[Example]):
    """What :func:`capture` and :func:`capture_examples` give: the missing examples, and where their rows go.

    num_missing  examples that have no row yet
    """

    def __init__(
        self,
        opened: Opened,
        examples: Examples[Example],
        *,
        name: Callable[[int], str],
        max_dropped: int,
    ) -> None:
        identity = opened.writer.identity
        self._pending, self._examples, self._name = opened.pending, examples, name
        self._targets, self._vocab_size = identity.targets, identity.inputs.vocab_size
        self._collector = UnitCollector(opened.writer, opened.pending)
        self._unit_ids: dict[bytes, str] = {}  # of examples that have been handed out
        self._num_dropped, self._max_dropped = len(opened.plan.skipped) + opened.num_skipped, max_dropped
        self.num_missing = sum(map(len, opened.pending))
        self.counts = {"examples": 0, "positions": 0, "entries": 0, "bytes": 0}

    def batches(self, size: int) -> Iterator[list[Example]]:
        """The missing examples, at most ``size`` at a time; a batch never reaches into another shard.

        Raises   DataError  when one cannot be used and ``max_dropped`` does not allow to leave it out, or
                            when it changed after the keys were made
        """
        for unit in self._pending:
            numbered = list(zip(unit.keys, unit.rows.tolist(), strict=True))
            for start in range(0, len(unit), size):
                found = [self._encoded(unit, key, row) for key, row in numbered[start : start + size]]
                batch = [one for one in found if one is not None]
                if batch:
                    yield batch

    def add(
        self,
        examples: Sequence[AnsweredExample],
        outputs_ND: Tensor,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
        chunk_size: int = 512,
        unseen_nD: Tensor | None = None,
    ) -> None:
        """Keeps the targets of some examples that ``batches`` gave, in any order.

        head     makes logits (n, V) of outputs (n, D), ``chunk_size`` positions at a time; None where the
                 outputs are logits or log-probs already.  Ids beyond the tokenizer's carry no mass
        Shapes   outputs_ND (N, D), or (N, V) without a head, any float dtype and device: one row for each
                 answer token of the examples, one example after the other; the row of an answer token is the
                 one that predicts it, which a causal model has at the token before
                 unseen_nD (n, D) or (n, V), the same of those examples that have ``unseen``, so fed: of a cache with
                 a visual gain
        Raises   ValueError  for another number of rows, or an example that is not missing
                 DataError   for NaN or infinity in what the teacher gave, and for an answer token that is outside
                             the vocabulary or has no probability
        """
        labels = torch.cat([one.answer_ids for one in examples]).to(outputs_ND.device, torch.int64)
        if len(labels) != len(outputs_ND):
            raise ValueError(
                f"outputs {tuple(outputs_ND.shape)} found; the examples have {len(labels)} answer tokens, one "
                "row for each is needed"
            )
        for one in examples:
            outside = one.answer_ids[(one.answer_ids < 0) | (one.answer_ids >= self._vocab_size)]
            if len(outside):
                raise DataError(
                    f"example {one.key.hex()}: answer token {int(outside[0])} found, 0 to {self._vocab_size - 1} "
                    "possible. Take the example out, or capture with the tokenizer that made it"
                )
        if len({one.key for one in examples} & self._unit_ids.keys()) < len(examples):
            raise ValueError("an example is not missing, came twice, or was not handed out by batches()")
        shown = [one for one in examples if getattr(one, "unseen", None) is not None]
        num_shown = sum(len(one.answer_ids) for one in shown)
        if num_shown != (0 if unseen_nD is None else len(unseen_nD)):
            raise ValueError(
                f"{0 if unseen_nD is None else len(unseen_nD)} outputs without pictures found; the examples with "
                f"pictures have {num_shown} answer tokens, one row for each is needed (unseen_nD)"
            )
        seeds = [position_seeds(self._targets.seed, one.key, len(one.answer_ids)) for one in examples]

        def logprobs(chunk_nD: Tensor) -> Tensor:
            logits_nV = chunk_nD if head is None else head(chunk_nD)
            return logits_nV[:, : self._vocab_size].float().log_softmax(-1)

        with torch.inference_mode():
            targets, ce_N = sparse_targets(
                outputs_ND,
                labels,
                torch.cat(seeds).to(outputs_ND.device),
                logprobs=logprobs,
                policy=self._targets.policy,
                temperatures=self._targets.temperatures,
                chunk_size=chunk_size,
            )
            gain_N = torch.zeros_like(ce_N)
            if unseen_nD is not None and shown:
                own_n = torch.cat([one.answer_ids for one in shown]).to(unseen_nD.device, torch.int64)
                unseen_ce_n = label_losses(unseen_nD, own_n, logprobs=logprobs, chunk_size=chunk_size)
                gain_N = label_gain(examples, ce_N, unseen_ce_n.to(ce_N.device))  # type: ignore[arg-type]
        if not gain_N.isfinite().all():
            raise DataError("what the teacher gives without the pictures is no distribution: NaN or infinity")
        rows = rows_of(
            examples,
            targets.to("cpu"),
            ce_N.cpu(),
            None if self._targets.visual_gain is None else gain_N.cpu(),
        )
        for row in rows:
            self._collector.add(self._unit_ids.pop(row.key), [row])
            found = (1, row.num_positions, row.num_entries, len(row.payload))
            self.counts = {k: v + n for (k, v), n in zip(self.counts.items(), found, strict=True)}
        self.num_missing -= len(rows)

    def _encoded(self, unit: Unit, key: bytes, number: int) -> Example | None:
        """An example, handed out; None for one that is left out."""
        try:
            example = self._examples[number]
        except DataError as error:
            self._num_dropped += 1
            if self._num_dropped > self._max_dropped:
                raise DataError(
                    f"{error}. That makes {self._num_dropped} left out, {self._max_dropped} allowed"
                ) from error
            self._collector.refuse(unit.unit_id, Refused(key, self._name(number), str(error)))
            self.num_missing -= 1
            return None
        if example.key != key:
            raise DataError(f"{self._name(number)}: changed while it was being captured; start again")
        self._unit_ids[key] = unit.unit_id
        return example


@contextmanager
def capture(
    recipe: Recipe, processor: ExampleProcessor, *, weights_fingerprint: str
) -> Iterator[Capture[Encoded]]:
    """The cache of a recipe, filled by a loop of one's own; both commands take it for one of their own.

    processor            of the teacher: ``open_processor(recipe.teacher.model, recipe.data)``; for a teacher in a
                         format that has none, the student's, whose tokenizer and template must be the same
    weights_fingerprint  names the teacher's weights: of a module ``weight_fingerprint(module)``; else any text
                         that differs when they do, as a digest of the files

    Raises   RecipeError         without sections teacher and cache
             CacheMismatchError  when the cache that is there was captured otherwise
             CacheFormatError    at the end of the block, when examples are still missing
    """
    if recipe.teacher is None or recipe.cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: a capture needs a teacher and a cache section")
    data = survey(recipe, processor)
    rows = NumberedRows(tuple(part.split for part in data.keyed))
    begin = time.monotonic()
    opened = open_planned(
        recipe.cache.location,
        identity_of(recipe, processor, data, weights_fingerprint=weights_fingerprint),
        data.keys,
        data.numbers,
        examples_per_shard=recipe.cache.examples_per_shard,
        skipped=data.unreadable(),
    )
    with opened.writer:
        examples = _EncodedRows(rows, processor, recipe.cache.visual_gain)
        one = Capture(opened, examples, name=rows.name, max_dropped=recipe.data.max_dropped)
        yield one
        _commit(opened, one, begin, max_dropped=recipe.data.max_dropped, recipe=dump_recipe(recipe))


@contextmanager
def capture_examples(
    location: str,
    examples: Examples[Example],
    keys: Sequence[bytes],
    *,
    teacher: TeacherIdentity,
    inputs: InputsIdentity,
    policy: Policy | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    seed: int = 0,
    label_log_prob: bool = False,
    examples_per_shard: int = 512,
    max_dropped: int = 0,
) -> Iterator[Capture[Example]]:
    """A cache of any examples: no recipe, no pictures needed.

    examples  by number, each with ``key``, ``answer_ids`` and ``truncated``; whatever else they carry comes
              back from ``batches``
    keys      16 bytes each, ``examples[number].key`` of every number: a digest of all that the teacher sees
              of the example, answer included.  Equal keys are captured once
    policy    ``Threshold()`` by default
    label_log_prob  also the teacher's log-prob of each answer token, which a row then carries
    Raises   CacheMismatchError  when the cache that is there was captured otherwise
             CacheFormatError    at the end of the block, when examples are still missing
    """
    targets = TargetsIdentity.of_capture(
        policy or Threshold(), temperatures=temperatures, seed=seed, label_log_prob=label_log_prob
    )
    key_array = as_key_array(keys)
    fingerprint = keys_fingerprint(key_array)
    source = DataSource(name="examples", split="all", fingerprint=fingerprint, rows=len(keys))
    begin = time.monotonic()
    opened = open_planned(
        location,
        Identity(teacher=teacher, inputs=inputs, targets=targets, data=(source,)),
        key_array,
        np.arange(len(keys)),
        examples_per_shard=examples_per_shard,
    )
    with opened.writer:
        one = Capture(opened, examples, name="examples[{}]".format, max_dropped=max_dropped)
        yield one
        _commit(opened, one, begin, max_dropped=max_dropped)


def text_inputs(
    tokenizer: PreTrainedTokenizerBase, *, max_answer_tokens: int | None = None
) -> InputsIdentity:
    """What ``capture_examples`` is told of examples that are text alone: the tokenizer, by content.

    max_answer_tokens  where longer answers were cut, None where none were
    """
    return InputsIdentity(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_fingerprint="none",
        image_processor_fingerprint="none",
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        max_answer_tokens=max_answer_tokens,
    )


def _commit(opened: Opened, one: Capture[Any], begin: float, *, max_dropped: int, **facts: Any) -> None:
    """The end of a block that raised nothing."""
    if one.counts["examples"]:
        seconds = round(time.monotonic() - begin, 3)
        opened.writer.log("captured", seconds=seconds, **one.counts, **environment(), **facts)
    opened.writer.commit(opened.plan, max_skipped=max_dropped)


class _EncodedRows:
    """The rows of several splits under one numbering, as tokens and pixels."""

    def __init__(self, rows: NumberedRows, processor: ExampleProcessor, unseen: VisualGain | None) -> None:
        self._rows, self._processor, self._unseen = rows, processor, unseen

    def __getitem__(self, number: int) -> Encoded:
        split, row = self._rows.find(number)
        return encoded_twice(self._processor, split[row], self._unseen)
