"""The teacher, and the cache of its targets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.errors import RecipeError
from shared.recipes.policies import Policy, Threshold, VisualGain
from shared.recipes.schema import Section
from shared.recipes.sections.types import (
    Dtype,
    NonNegativeInt,
    NumWorkers,
    Place,
    PositiveInt,
    Seed,
    Split,
    Temperature,
)

WEIGHT_SLACK = 1e-6  # of the sum of a mix's weights, as people type thirds


class TeacherConfig(Section):
    """The frozen teacher of stage one."""

    model: Place
    """Hub name or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trained_by: Place | None = None
    """The recipe whose export is this model; it is run when the folder is missing. A file is looked for in the
    current folder."""
    dtype: Dtype = "bfloat16"
    """Of the weights and the computation."""
    attn_implementation: str | None = None
    """As Transformers names it, such as `sdpa`; null: Transformers chooses."""
    shard: bool = False
    """FSDP2 over all ranks, for a teacher too large for one GPU; ranks then step together."""
    tensor: PositiveInt = 1
    """Ranks that share each layer of a copy of the teacher (tensor parallel); they work on the same batches."""
    expert: PositiveInt = 1
    """Ranks that share the experts of each layer (expert parallel); the same ranks as those of `tensor`."""

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold one copy of the teacher together and work on the same batches."""
        return max(self.tensor, self.expert)

    def require_ranks(self, num_ranks: int) -> None:
        """Raises   RecipeError  when so many ranks cannot be copies of the teacher"""
        if num_ranks % self.ranks_per_copy:
            setting = "tensor" if self.tensor > 1 else "expert"
            raise RecipeError(
                f"teacher.{setting} {self.ranks_per_copy}: {num_ranks} process(es) found, a multiple of "
                f"{self.ranks_per_copy} is needed: so many share each copy of the teacher. Start as many "
                "(NPROC, torchrun --nproc-per-node)"
            )

    @model_validator(mode="after")
    def _one_way_to_share(self) -> Self:
        if self.shard and self.ranks_per_copy > 1:
            raise ValueError(
                "shard beside tensor or expert: FSDP2 shards the teacher over all ranks, which share no batches. "
                "Choose one"
            )
        if 1 < self.tensor != self.expert > 1:
            raise ValueError(
                f"tensor {self.tensor} and expert {self.expert}: the same ranks share layers and experts. Make them "
                "equal, or leave one out"
            )
        return self


class MixedCache(Section):
    """One cache of a mix."""

    path: Place
    """Local folder or fsspec URL."""
    weight: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its share of the targets; those of a mix sum to 1. null, for all of them: equal shares."""


class CacheConfig(Section):
    """Where the cache is, or several of them, which targets it holds, and how it is captured."""

    alternatives = (("path", "mix"),)

    path: Place | Annotated[tuple[Place, ...], Field(min_length=1)] | None = None
    """Local folder or fsspec URL. A list, for stage two: caches of different rows, captured alike."""
    mix: Annotated[tuple[MixedCache, ...], Field(min_length=1)] | None = None
    """Instead of `path`, for stage two: caches of the same rows by several teachers. The targets of a row are their
    weighted sum. All must be of `policy`; their `seed` may differ."""
    duplicates: Literal["refuse", "first"] = "refuse"
    """A row that several caches of a list hold is an error, or is taken from the first of them."""
    teachers: Literal["one", "many"] = "one"
    """`many`: the caches of a list may be of different teachers, each for its own rows."""
    splits: tuple[Split, ...] = ("train", "validation")
    """Splits whose rows are captured."""
    policy: Policy = Threshold()
    temperatures: tuple[Temperature, ...] = (1.0,)
    """Temperatures that a student may use."""
    seed: Seed = 0
    """Of the draws. It belongs to the cache's identity."""
    label_log_prob: bool = False
    """Also the teacher's log-prob of the written token, two bytes a position, for losses that need it. It belongs to
    the cache's identity."""
    visual_gain: VisualGain | None = None
    """Also what the pictures give each token of the answer, two bytes a position: its log-prob less that of a second
    pass with the pictures `blurred`, or `removed` from the prompt. null: no second pass. It belongs to the cache's
    identity."""
    examples_per_shard: PositiveInt = 512
    """Examples in one file."""
    batch_tokens: PositiveInt = 16384
    """Tokens of a teacher's microbatch, padding counted."""
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    """Answer positions that pass the teacher's head together. `auto`: 512 on a CPU, up to 2048 as a GPU's memory
    allows."""
    num_workers: NumWorkers = 2
    """Processes that decode pictures, for each rank."""
    claim_timeout_s: Annotated[float, Field(ge=1, le=1e6)] = 180
    """Seconds after which a process that captures and is silent is taken to be dead: others capture its units. Longer
    than the network file system takes to show a change."""
    shuffle_window: NonNegativeInt | Literal["auto"] = "auto"
    """Shards whose examples a student mixes at a time, so that it needs no others meanwhile. 0: the order of an epoch
    does not look at shards. `auto`: 0, but for a remote cache that is larger than the staging folder."""

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError("temperatures must be a list of one or more different values")
        return self

    @model_validator(mode="after")
    def _caches_differ(self) -> Self:
        twice = sorted({one for one in self.locations if self.locations.count(one) > 1})
        if twice:
            raise ValueError(f"{'mix' if self.mix else 'path'} names {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _a_mix_is_no_list(self) -> Self:
        of_lists = {"duplicates": self.duplicates == "first", "teachers": self.teachers == "many"}
        if self.mix and (given := [name for name, is_set in of_lists.items() if is_set]):
            raise ValueError(
                f"{' and '.join(given)} beside mix: only a list of caches has such a setting. Take it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        given = [one.weight for one in self.mix or () if one.weight is not None]
        if given and len(given) < len(self.mix or ()):
            raise ValueError(
                "mix: some of its caches have a weight and some have none. Give all of them one, or none"
            )
        if given and abs(sum(given) - 1) > WEIGHT_SLACK:
            raise ValueError(
                f"mix: the weights {', '.join(f'{one:g}' for one in given)} sum to {sum(given):g}; they must sum to 1"
            )
        return self

    @property
    def locations(self) -> tuple[str, ...]:
        """Of all caches, in their order."""
        if self.mix is not None:
            return tuple(one.path for one in self.mix)
        return (self.path,) if isinstance(self.path, str) else self.path or ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the caches of a mix; they sum to 1 to rounding."""
        mixed = self.mix or ()
        return tuple(1 / len(mixed) if one.weight is None else one.weight for one in mixed)

    @property
    def is_one(self) -> bool:
        """Whether it names one cache, as a capture needs it."""
        return self.mix is None and len(self.locations) == 1

    @property
    def location(self) -> str:
        """Of the one cache.

        Raises   RecipeError  where the recipe names several, or a mix: a capture writes one
        """
        if not self.is_one:
            what = "cache.mix" if self.mix else "cache.path"
            raise RecipeError(
                f"{what} names {', '.join(self.locations)}: stage two reads these together, a capture writes one. "
                "Name the cache to capture: --set cache.path=FOLDER"
            )
        return self.locations[0]

    @property
    def has_many_teachers(self) -> bool:
        """Whether its targets may be of other teachers than the recipe's."""
        return self.mix is not None or self.teachers == "many"
