"""The same question without what its pictures show: what tells how much they matter (``cache.visual_gain``).

    one = encoded_twice(processor, example, "blurred")
    one.unseen                  # what the teacher is fed in its second pass; None for an example without pictures

A blurred picture keeps its size, so nothing else of the prompt changes.  A removed one leaves a prompt of text
alone, which not every model is asked.
"""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from PIL import ImageFilter

from shared.data.collation import Encoded
from shared.data.images import decode_rgb
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.errors import DataError, RecipeError
from shared.recipes.policies import VisualGain

BLUR = (
    8  # the standard deviation of the blur is the longer side divided by this; it belongs to caches' identity
)


def encoded_twice(processor: ExampleProcessor, example: Example, how: VisualGain | None) -> Encoded:
    """What a model is fed of an example, with ``unseen`` where it has pictures; None: without.

    Raises   DataError    naming the row, as ``encode`` does
             RecipeError  when the model cannot be asked the same without pictures
    """
    one = processor.encode(example)
    if how is None or not example.images:
        return one
    if how == "removed":
        return replace(one, unseen=_without_pictures(processor, example, one))
    blurred = tuple(_blurred(image, processor) for image in example.images)
    unseen = processor.encode(replace(example, images=blurred))
    if not torch.equal(unseen.input_ids, one.input_ids):
        raise RecipeError(
            f"{example.where}: this model's processor makes {len(unseen.input_ids)} tokens of it with its pictures "
            f"blurred, {len(one.input_ids)} of it as it is. Set cache.visual_gain to removed"
        )
    return replace(one, unseen=replace(unseen, key=one.key))


def _without_pictures(processor: ExampleProcessor, example: Example, one: Encoded) -> Encoded:
    turns = tuple(
        replace(turn, parts=tuple(part for part in turn.parts if part is not None)) for turn in example.turns
    )
    try:
        unseen = processor.encode(replace(example, images=(), turns=turns))
    except DataError as error:
        raise RecipeError(
            f"cache.visual_gain removed: {error}. Set it to blurred, which leaves the prompt as it is"
        ) from error
    if not torch.equal(unseen.answer_ids, one.answer_ids):
        raise RecipeError(
            f"cache.visual_gain removed: {example.where}: without its pictures the chat template makes another "
            "answer of it. Set it to blurred, which leaves the prompt as it is"
        )
    return replace(unseen, key=one.key)


def _blurred(image: bytes, processor: ExampleProcessor) -> bytes:
    """The picture file, blurred so far that colours and rough places are left."""
    picture = decode_rgb(image, background=processor.background)
    blurred = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / BLUR))
    stream = io.BytesIO()
    blurred.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
