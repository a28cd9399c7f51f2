"""What a run reads: processor, surveyed splits, and the cache, each checked against the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from shared.cache import Cache, CacheMix, open_caches
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, CacheMismatchError
from shared.places import is_there
from shared.recipes import Recipe
from shared.runtime import World
from shared.same_prompts import inputs_identity, open_student_processor_of, require_same_rendering
from shared.same_teacher import require_teacher
from shared.shard_order import ShardLayout, window_of
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.identity import BY_SHARDS, CACHE, MIX, ORDER, OWN, run_identity
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.data_change import keep_rows
from stage2_student.training.emphasis import Emphasis
from stage2_student.training.feed import MicrobatchSource
from stage2_student.training.order import ORDER_OF_EXAMPLES
from stage2_student.training.own_answers import counts_own, require_samples
from stage2_student.training.student import KL_TEMPERATURE
from stage2_student.training.survey import Survey, survey_once


@dataclass(frozen=True)
class Inputs:
    """Opened and found to fit together.

    validation        None where the data have no such split
    cache             what training needs; None for labels alone
    validation_cache  what validation measures KL by: the same, or for labels alone one that happens to be there
    window            shards of the cache whose examples are mixed; 0: the order does not look at shards
    emphasis          which positions count in training, and how much; None: all alike, as always in validation
    scores_own        training needs the teacher's log-probs of what the student wrote
    """

    processor: ExampleProcessor
    train: Survey
    validation: Survey | None
    cache: Cache | None
    validation_cache: Cache | None
    num_ranks: int = 1
    packing: bool = False
    may_drop: bool = False
    window: int = 0
    emphasis: Emphasis | None = None
    scores_own: bool = False

    @cached_property
    def layout(self) -> ShardLayout | None:
        """Where the examples lie, if their order follows the cache's shards."""
        if not self.window or self.cache is None:
            return None
        return ShardLayout.of(self.cache.shards(self.train.keys))

    def record(self) -> dict[str, Any]:
        """The first line of metrics.jsonl."""
        splits = {"train": self._facts(self.train, self.cache)}
        if self.validation is not None:
            splits["validation"] = self._facts(self.validation, self.validation_cache)
        return {"event": "data", "step": 0, "splits": splits}

    @staticmethod
    def _facts(survey: Survey, cache: Cache | None) -> dict[str, Any]:
        """With the number of rows of each teacher, where there are several."""
        if cache is None or len(cache.teacher_names) == 1:
            return survey.facts
        held = survey.keys[cache.contains(survey.keys)]
        return survey.facts | {"teachers": dict(Counter(cache.teachers(held)))}

    def surveys(self) -> dict[str, Survey]:
        """By their names in a run's identity."""
        found = {"data.train": self.train}
        return found if self.validation is None else found | {"data.validation": self.validation}

    def keep(self, folder: RunFolder, checkpoint: Checkpoint | None, changes: list[str]) -> None:
        """Writes down which rows there are, and what of them has changed since the checkpoint."""
        for survey in self.surveys().values():
            keep_rows(folder, survey)
        if checkpoint is not None and changes:
            step = checkpoint.facts.step
            folder.metrics.append(self.record() | {"event": "data_change", "step": step, "changes": changes})

    def training_source(self) -> MicrobatchSource:
        return self._microbatches(self.train, self.cache, emphasis=self.emphasis, scores_own=self.scores_own)

    def validation_source(self) -> MicrobatchSource:
        assert self.validation is not None
        return self._microbatches(self.validation, self.validation_cache)

    def _microbatches(
        self,
        survey: Survey,
        cache: Cache | None,
        *,
        emphasis: Emphasis | None = None,
        scores_own: bool = False,
    ) -> MicrobatchSource:
        return survey.microbatches(
            self.processor,
            cache,
            num_ranks=self.num_ranks,
            packing=self.packing,
            may_drop=self.may_drop,
            emphasis=emphasis,
            scores_own=scores_own,
        )

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """What a checkpoint says it was trained on: by content, so that folders may move."""
        contents = {
            ORDER: self._order(),
            "data.train": self.train.fingerprint,
            "data.validation": None if self.validation is None else self.validation.fingerprint,
            "tokenizer": self.processor.tokenizer_fingerprint,
            "template": self.processor.template_fingerprint,
            **({} if self.processor.date is None else {"date": self.processor.date}),
            **({OWN: self.train.own_fingerprint} if counts_own(recipe) else {}),
            "image_processor": self.processor.image_processor_fingerprint,
            CACHE: None if self.cache is None else self.cache.fingerprint,
            **({MIX: mix_identity(self.cache)} if isinstance(self.cache, CacheMix) else {}),
        }
        return run_identity(recipe, contents=contents)

    def _order(self) -> str:
        if self.layout is None:
            return ORDER_OF_EXAMPLES
        return f"{ORDER_OF_EXAMPLES}, {BY_SHARDS} {self.window} shards, layout {self.layout.fingerprint}"


def open_inputs(recipe: Recipe, world: World) -> Inputs:
    """Raises   TeachonceError  of the kind that fits, when something is missing or does not fit"""
    processor = open_student_processor_of(recipe, recipe.student.model, revision=recipe.student.revision)
    cache, notices = open_cache(recipe, processor)
    validation_cache = cache
    if cache is None and recipe.data.splits.validation is not None:
        validation_cache, notices = _open_validation_cache(recipe, processor, world)
    if cache is not None:
        distilled = cache
        notices += world.by_main(lambda: require_teacher(distilled, recipe.teacher))
    train = survey_once(recipe, "train", processor, cache, world)
    notices += require_samples(recipe, train.own_writers)
    validation = None
    if recipe.data.splits.validation is not None:
        validation = survey_once(recipe, "validation", processor, cache, world)
        if validation.written_by:
            notices += (
                "the validation split's rows say who wrote their answers (column "
                f"{recipe.data.columns.written_by}): CE, KL and right answers are against these. To keep the given "
                "ones, let a model answer the training prompts alone (write.splits: [train], data.written)",
            )
    emphasis = world.by_main(lambda: Emphasis.of(recipe, cache, train.keys, has_own=bool(train.own.any())))
    window = world.by_main(lambda: shuffle_window(recipe, cache))  # machines may have other staging folders
    if window and cache is not None:
        notices += (
            f"the examples of {window} of the cache's {num_shards(cache)} shards are mixed at a time "
            "(cache.shuffle_window)",
        )
    if world.is_main:
        for notice in (*notices, train.notice(), validation.notice() if validation else None):
            if notice:
                tqdm.write(f"note: {notice}")
    return Inputs(
        processor,
        train,
        validation,
        cache,
        validation_cache,
        num_ranks=world.num_data_ranks,
        packing=recipe.optimization.packing,
        may_drop=recipe.data.max_dropped > 0,
        window=window,
        emphasis=emphasis,
        scores_own=recipe.loss.reverse_kl is not None,
    )


def shuffle_window(recipe: Recipe, cache: Cache | None) -> int:
    """The recipe's, or what the staging folder of this machine asks for; 0 without a cache."""
    if recipe.cache is None or cache is None:
        return 0
    if recipe.cache.shuffle_window != "auto":
        return recipe.cache.shuffle_window
    if cache.staging_bytes is None:
        return 0
    remote = [part.manifest for part in cache.parts if part.staging_bytes is not None]
    tables = sum(file.bytes for manifest in remote for file in manifest.files)  # which lie there too
    sizes = [manifest.shards.column("bytes").tolist() for manifest in remote]
    together = map(sum, zip_longest(*sizes, fillvalue=0)) if isinstance(cache, CacheMix) else chain(*sizes)
    return window_of(list(together), room=cache.staging_bytes - tables)


def mix_identity(cache: CacheMix) -> list[list[Any]]:
    """Whose targets are added up, with which weights; in which order does not matter."""
    parts = zip(cache.parts, cache.weights, strict=True)
    return sorted([part.manifest.identity.digest()[:16], round(weight, 9)] for part, weight in parts)


def num_shards(cache: Cache) -> int:
    """That an order by shards goes through."""
    of_each = [part.num_shards for part in cache.parts]
    return max(of_each) if isinstance(cache, CacheMix) else sum(of_each)


def open_cache(recipe: Recipe, processor: ExampleProcessor) -> tuple[Cache | None, tuple[str, ...]]:
    """The cache, where the recipe distils, and what is worth saying about it.

    Raises   CacheMismatchError  with all that keeps this student from it
    """
    if not recipe.distils:
        return None, ()
    return open_targets(recipe, processor, temperature=recipe.loss.temperature)


def open_targets(
    recipe: Recipe, processor: ExampleProcessor, *, temperature: float
) -> tuple[Cache, tuple[str, ...]]:
    """The recipe's cache as one of targets at that temperature, whatever the loss, and what is worth saying.

    Raises   CacheFormatError, CacheMismatchError  as a reader does, and with all that does not fit
    """
    assert recipe.cache is not None
    cache = open_caches(recipe.cache)
    own = inputs_identity(processor.of_keys, recipe.data)
    notices = cache.require_student(
        own,
        temperature=temperature,
        policy=recipe.cache.policy,
        seed=recipe.cache.seed,
        temperatures=recipe.cache.temperatures,
        label_log_prob=recipe.cache.label_log_prob,
        visual_gain=recipe.cache.visual_gain,
        teacher=recipe.teacher.model if recipe.teacher and recipe.student.other_vocabulary else None,
    )
    require_same_rendering(cache, processor, recipe.data)
    return cache, notices


def _open_validation_cache(
    recipe: Recipe, processor: ExampleProcessor, world: World
) -> tuple[Cache | None, tuple[str, ...]]:
    """The cache of a student that trains without it, on all ranks or on none; what is wrong with it is only said."""
    cache: Cache | None = None
    notices: tuple[str, ...] = ()
    if recipe.cache is not None and any(map(is_there, recipe.cache.locations)):
        try:
            cache, notices = open_targets(recipe, processor, temperature=KL_TEMPERATURE)
        except (CacheFormatError, CacheMismatchError) as error:
            notices = (no_kl(error),)
    everywhere: list[tuple[bool, tuple[str, ...]]] = [(False, ())] * world.size
    dist.all_gather_object(everywhere, (cache is not None, notices))
    if cache is not None and all(opened for opened, _ in everywhere):
        try:
            found = cache
            return cache, notices + world.by_main(lambda: require_teacher(found, recipe.teacher))
        except CacheMismatchError as error:
            return None, (no_kl(error),)
    return None, next((told for opened, told in everywhere if not opened), ())


def no_kl(error: Exception) -> str:
    """Why a model is measured without its teacher."""
    return f"no KL to the teacher, its cache cannot be used: {error}"
