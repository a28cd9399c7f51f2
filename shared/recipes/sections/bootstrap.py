"""What a recipe makes that has no data or models: a drawn set, small models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.recipes.schema import Section
from shared.recipes.sections.types import Fraction, LocalPlace, PositiveInt, Seed


class PhantomConfig(Section):
    """A drawn VQA set, made in ``data.source`` when that is missing; five questions for each picture."""

    train: PositiveInt = 240
    """Pictures of the training split."""
    validation: PositiveInt = 32
    """Pictures of the validation split."""
    test: PositiveInt = 32
    """Pictures of the test split."""
    size: Annotated[int, Field(ge=64)] = 128
    """Width and height in pixels."""
    seed: Seed = 0
    """Of the drawing."""
    mistaken: Fraction = 0.0
    """Share of the short training answers that are another picture's, as annotators err."""


class SmallModelConfig(Section):
    """A small instance of the Qwen3.5 classes with random weights."""

    path: LocalPlace
    """Folder to make."""
    hidden_size: PositiveInt
    """Width of the language model, a multiple of 32."""
    num_layers: PositiveInt
    """Layers of the language model."""
    vision_hidden_size: PositiveInt
    """Width of the vision tower, a multiple of 32."""
    vision_depth: PositiveInt
    """Layers of the vision tower."""
    seed: Seed = 0
    """Of the random weights."""


class SmallModelsConfig(Section):
    """Small models that share one tokenizer trained on the data set's texts; made when missing."""

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    """Ids of the tokenizer, at most."""
    models: tuple[SmallModelConfig, ...]
    """One entry a model."""


class BootstrapConfig(Section):
    """What a trial recipe makes for itself before stage one; real recipes have none."""

    phantom: PhantomConfig | None = None
    small_models: SmallModelsConfig | None = None
