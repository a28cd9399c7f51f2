"""A model answers prompts, token by token, in batches: ``generate`` of Transformers with its key-value cache.

    ends = own_ends(model, processor)
    forget_settings(model)
    answered = answer(model, processor, encoded, max_new_tokens=64)                     # greedy
    answered = answer(model, processor, encoded, max_new_tokens=64, ends=ends,
                      choose=[Refused(ids), *sampled(seeds_B, temperature=0.7, top_p=0.9)])

A sampled token is the one with the largest sum of log-probability and Gumbel noise, which is a sample of the
distribution.  The noise is a pure function of a row's seed, the place in its answer and the token.  So a row's answer
does not depend on its batch, the rank or the device, but for rounding.

Shapes: B prompts, V ids of the head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.models.vlm import in_dtype_of, split
from shared.sparse.draws import substream, uniforms


class Answered(NamedTuple):
    """Ids of an answer without the token that ends it, and whether the model wrote that token."""

    ids: list[int]
    is_whole: bool


def own_ends(model: PreTrainedModel, processor: ExampleProcessor) -> tuple[int, ...]:
    """The tokens by which a model ends what it writes: that of the turn first, then those that its folder names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    others = named if isinstance(named, list | tuple) else [] if named is None else [named]
    return tuple(dict.fromkeys([processor.end_of_turn, *others]))


def forget_settings(model: PreTrainedModel) -> None:
    """Takes away what the model's folder asks for, such as penalties: nobody here has chosen them."""
    model.generation_config = GenerationConfig()


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ExampleProcessor,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    choose: Sequence[LogitsProcessor] = (),
    stop: StoppingCriteria | None = None,
) -> list[Answered]:
    """An answer to each prompt, up to the first of ``ends``, by default that of the turn.

    prompts  as ``encode_prompt`` makes them
    choose   what is done to the logits before the largest of them is taken
    """
    ends = ends or (processor.end_of_turn,)
    batch = processor.collate(prompts, padding_side="left").to(model.device)
    ids = model.generate(  # type: ignore[operator]
        **in_dtype_of(split(model)[1], batch.inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=processor.end_of_turn,
        logits_processor=LogitsProcessorList(choose),
        stopping_criteria=StoppingCriteriaList([] if stop is None else [stop]),
    )
    new = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
    return [_cut(row, ends) for row in new]


def _cut(row: list[int], ends: Sequence[int]) -> Answered:
    end = next((place for place, one in enumerate(row) if one in ends), None)
    return Answered(row[:end], is_whole=end is not None)


def sampled(seeds_B: Tensor, *, temperature: float, top_p: float) -> list[LogitsProcessor]:
    """What makes the largest logit a sample; nothing at temperature 0, where the likeliest token is taken.

    Shapes   seeds_B (B,) int64, one for each answer
    """
    if temperature == 0:
        return []
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return [TemperatureLogitsWarper(temperature), *nucleus, GumbelNoise(seeds_B)]


class GumbelNoise(LogitsProcessor):
    """Adds ``-log(-log(u))``, with a uniform ``u`` of its own for each row, place and token."""

    def __init__(self, seeds_B: Tensor) -> None:
        self._seeds_B = seeds_B
        self._place = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seeds_B1 = substream(self._seeds_B.to(scores.device), self._place)[:, None]
        self._place += 1
        uniform_BV = uniforms(seeds_B1, torch.arange(scores.shape[1], device=scores.device)[None])
        # Above 0 and below 1, where the noise is finite.  What is added to rounds to 1 at the upper end.
        return scores - (-uniform_BV.clamp_min(2.0**-54).log()).log()


class Refused(LogitsProcessor):
    """Tokens that no answer may hold, and ids of the head that are no token, are never chosen.

    ids  some may be beyond the head
    """

    def __init__(self, ids: Collection[int], *, num_token_ids: int) -> None:
        self._ids, self._num_token_ids = torch.tensor(sorted(ids)), num_token_ids
        self._refused_V: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._refused_V is None:
            ids_V = torch.arange(scores.shape[1], device=scores.device)
            is_refused_V = torch.isin(ids_V, self._ids.to(scores.device))
            self._refused_V = is_refused_V | (ids_V >= self._num_token_ids)
        return scores.masked_fill(self._refused_V, -torch.inf)
