"""A look at every row of a split before any work: which can be read, what their keys are.

Pictures are hashed, not decoded.  Stage one plans its units from the keys, stage two its steps, and the
pipeline asks whether the cache holds them all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from shared.cache import Cache, CacheReader, InputsIdentity, Plan, PromptIdentity, open_caches
from shared.cache.index import Keys, as_key_array
from shared.cache.layout import PLAN_NAME
from shared.cache.manifest import ShardInfo, load_manifest
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.cache.verified import VerifiedFiles
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import VqaSplit, open_split
from shared.errors import (
    CacheFormatError,
    CacheMismatchError,
    DataError,
    RecipeError,
    TeachonceError,
    listed,
)
from shared.other_vocabulary import student_of_another
from shared.recipes import DataConfig, Recipe, Split
from shared.surveying import (
    Surveyors,
    keys_of,
    num_pictures_of,
    picture_tokens_of,
    reasons_of,
    survey_rows,
    writers_of,
)

MAX_WRITERS, MAX_WRITER = 100, 2000  # named in a manifest; characters of one
NUM_MEASURED = 4  # rows that are tried for the tokens of a template


@dataclass(frozen=True, eq=False)
class Keyed:
    """The readable rows of a split.

    rows        (n,) int64, rows of the split
    keys        (n, 16) uint8, theirs, in order
    lengths     (n,) int64, about so many tokens, the picture's among them: a measure to put like with like
    pixels      (n,) int64, about so many that a vision tower sees of its pictures
    unreadable  (row, reason) of each row that has no usable picture, question or answer
    num_outvoted  answers that are not used, of rows that hold lists of them
    has_pictures  whether any of the rows has one
    written_by  the models that wrote answers of the rows, as these say
    """

    split: VqaSplit
    rows: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray
    unreadable: tuple[tuple[int, str], ...]
    num_outvoted: int = 0
    has_pictures: bool = True
    written_by: tuple[str, ...] = ()

    def at(self, places: np.ndarray) -> Keyed:
        """Some of the readable rows, by their places among these, (m,) int64."""
        parts = {name: getattr(self, name)[places] for name in ("rows", "keys", "lengths", "pixels")}
        return replace(self, **parts)

    @property
    def fingerprint(self) -> str:
        """Hex digest over the keys in order."""
        return keys_fingerprint(self.keys)


def keys_fingerprint(keys: np.ndarray) -> str:
    """Hex, over keys of 16 bytes in order, as an array of any shape."""
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


def survey_keys(
    data: DataConfig,
    name: Split,
    processor: ExampleProcessor,
    surveyors: Surveyors | None = None,
    *,
    show: bool = False,
    decode: bool = False,
) -> Keyed:
    """What every row of the split is; called by all ranks, which share the reading.

    surveyors  None: this process alone, and nothing is kept
    show       with a progress bar
    decode     also finds pictures that cannot be decoded, where no capture has found them before
    """
    surveyors = surveyors or Surveyors()
    split = surveyors.world.by_main(lambda: open_split(data, name))
    table = survey_rows(split, processor, surveyors, decode=decode, show=show)
    is_usable = table.column("key").is_valid().to_numpy()
    rows = np.flatnonzero(is_usable)
    usable = table if len(rows) == len(table) else table.filter(pa.array(is_usable))  # which copies
    picture_tokens = picture_tokens_of(usable, processor)
    lengths = usable.column("text_tokens").to_numpy() + picture_tokens
    measured = surveyors.world.by_main(lambda: measure(split, rows, lengths, picture_tokens, processor))
    return Keyed(
        split=split,
        rows=rows,
        keys=keys_of(usable),
        lengths=lengths + measured.template_tokens,
        pixels=measured.pixels(picture_tokens),
        unreadable=reasons_of(table),
        num_outvoted=int(usable.column("outvoted").to_numpy().sum()),
        has_pictures=num_pictures_of(usable) > 0,
        written_by=told_writers(writers_of(usable)),
    )


def told_writers(writers: Counter[str]) -> tuple[str, ...]:
    """Who wrote answers, in order; of more than ``MAX_WRITERS`` those of most rows, and how many others there are."""
    named = Counter({name[:MAX_WRITER]: number for name, number in writers.items() if name})
    most = sorted(name for name, _ in named.most_common(MAX_WRITERS))
    num_others = len(named) - len(most)
    return (*most, *([f"and {num_others:,} others"] if num_others else []))


@dataclass(frozen=True)
class Measured:
    """What texts and headers of pictures do not tell, as an encoded example has it.

    template_tokens   beside those of the texts and pictures
    pixels_per_token  that a vision tower sees for each token of a picture; 0.0 without pictures
    """

    template_tokens: int = 0
    pixels_per_token: float = 0.0

    def pixels(self, picture_tokens: np.ndarray) -> np.ndarray:
        return np.rint(picture_tokens * self.pixels_per_token).astype(np.int64)


def measure(
    split: VqaSplit,
    rows: np.ndarray,
    lengths: np.ndarray,
    picture_tokens: np.ndarray,
    processor: ExampleProcessor,
) -> Measured:
    """Of the first usable row with a picture, or else of the first one; ``lengths`` are without the template's."""
    with_pictures = np.flatnonzero(picture_tokens)[:NUM_MEASURED].tolist()
    for place in [*with_pictures, *range(min(len(rows), 2 * NUM_MEASURED))][: 2 * NUM_MEASURED]:
        try:
            one = processor.encode(split[int(rows[place])])
        except DataError:  # whoever needs the row says what is wrong with it
            continue
        template_tokens = max(0, len(one.input_ids) - int(lengths[place]))
        return Measured(template_tokens, processor.pixels(one) / max(1, int(picture_tokens[place])))
    return Measured()


def inputs_identity(processor: ExampleProcessor, data: DataConfig) -> InputsIdentity:
    """How examples become tokens and pictures, for the manifest and for the student's comparison with it."""
    return InputsIdentity(
        tokenizer_fingerprint=processor.tokenizer_fingerprint,
        template_fingerprint=processor.template_fingerprint,
        image_processor_fingerprint=processor.image_processor_fingerprint,
        vocab_size=processor.num_token_ids,
        max_answer_tokens=data.max_answer_tokens,
    )


def prompt_identity(processor: ExampleProcessor, data: DataConfig) -> PromptIdentity:
    """What else decides the prompts, for the manifest and for what a student is told."""
    return PromptIdentity(
        system_prompt=data.system_prompt,
        date=processor.date,
        thinking=processor.thinking,
        train_on=data.train_on,
        rendered=processor.rendered,
    )


def open_processor_of(recipe: Recipe, model: str, *, revision: str | None) -> ExampleProcessor:
    """As ``open_processor``, for prompts of the day that the recipe names, or else of its cache's.

    An interrupted capture goes on with the day on which it began.
    """
    return open_processor(model, _of_its_day(recipe).data, revision=revision)


def open_student_processor_of(recipe: Recipe, model: str, *, revision: str | None) -> ExampleProcessor:
    """As ``open_processor_of``; where the recipe says so, the tokenizer may be another one than the teacher's.

    Raises   RecipeError  when one of the two cannot be opened, or their tokens cannot be compared
    """
    if recipe.cache is None or not recipe.student.other_vocabulary:
        return open_processor_of(recipe, model, revision=revision)
    recipe = _of_its_day(recipe)
    return student_of_another(model, recipe.data, _open_teacher_processor(recipe), revision=revision)


def _open_teacher_processor(recipe: Recipe) -> ExampleProcessor:
    assert recipe.teacher is not None  # a recipe with a cache and another tokenizer has one
    try:
        return open_processor(recipe.teacher.model, recipe.data, revision=recipe.teacher.revision)
    except RecipeError as error:
        raise RecipeError(
            f"student.other_vocabulary: the teacher's tokenizer and chat template make the keys of the cache. {error}"
            ". Put its tokenizer and processor files there; its weights are not needed"
        ) from error


def _of_its_day(recipe: Recipe) -> Recipe:
    """Its prompts are written for the day that it names, or else its cache's."""
    if recipe.data.date is not None or recipe.cache is None:
        return recipe
    days = (prompt_date_of(location) for location in recipe.cache.locations)
    return recipe.of_day(next((day for day in days if day is not None), None))


def prompt_date_of(location: str) -> str | None:
    """The day that a cache's prompts tell; None where there is no cache, or one whose prompts have no date."""
    try:
        folder = open_folder(location)
        manifest = load_manifest(folder)
        identity = (
            manifest.identity if manifest else Plan.decode(folder.read(PLAN_NAME), where=location).identity
        )
    except (TeachonceError, OSError):  # whoever opens the cache says what is wrong with it
        return None
    return None if identity.prompt is None else identity.prompt.date


def require_in_the_cache(
    cache: Cache,
    keys: Keys,
    processor: ExampleProcessor,
    data: DataConfig,
    *,
    name_of: Callable[[int], str],
    num_all: int | None = None,
) -> None:
    """Raises   CacheMismatchError  when examples are missing where they must be: how many, and which first

    name_of  what to call the example of a key, by its place
    num_all  examples that were looked for, where these keys are some of them
    """
    num_all = len(keys) if num_all is None else num_all
    problems = [
        _missing(
            lacking,
            processor,
            data,
            told=f"{len(places)} of {num_all} examples",
            first=name_of(int(places[0])),
        )
        for lacking, places in cache.lacking(keys)
    ]
    if problems:
        raise CacheMismatchError("\n".join(problems))


def _missing(cache: Cache, processor: ExampleProcessor, data: DataConfig, *, told: str, first: str) -> str:
    """What the prompts have otherwise than those of the cache, where that is known and explains it."""
    own, num_caches = prompt_identity(processor.of_keys, data), len(cache.parts)
    found = [(part.location, part.manifest.identity.prompt) for part in cache.parts]
    differing = [[] if stored is None else stored.differences(own) for _, stored in found]
    where = f"cache {cache.location}: {told} are not in it, {first} first"
    remedy = "Run teacher-cache again: only what is missing is captured"
    if num_caches > 1:
        where = f"caches {cache.location}: {told} are in none of them, {first} first"
        remedy = "Capture them into one of these caches, or into one of their own and add it to cache.path"
    if not all(differing):
        return f"{where}. {remedy}"
    lines = [
        line if num_caches == 1 else f"{location}: {line}"
        for (location, _), some in zip(found, differing, strict=True)
        for line in some
    ]
    return (
        f"{where}. The prompts differ from those of the cache:\n{listed(lines)}\nAsk as the cache does "
        "(data.system_prompt, data.date, data.train_on, the student's chat template), or run teacher-cache again"
    )


def require_same_rendering(cache: Cache, processor: ExampleProcessor, data: DataConfig) -> None:
    """Raises   CacheMismatchError  when the same settings give another prompt than a cache's; keys do not tell"""
    own = prompt_identity(processor.of_keys, data)
    for part in cache.parts:
        stored = part.manifest.identity.prompt
        if stored is not None and stored.contradicts(own):
            raise CacheMismatchError(
                f"cache {part.location}: the same template writes another text around question and answer:\n"
                f"{listed(stored.differences(own))}\nCompare the special tokens of both tokenizers (bos_token and "
                "others)"
            )


def captured_splits(recipe: Recipe) -> list[Split]:
    """Splits that the cache of this recipe is to hold: those it names and the data set has."""
    assert recipe.cache is not None
    return [name for name in recipe.cache.splits if getattr(recipe.data.splits, name) is not None]


def cache_covers(recipe: Recipe) -> bool:
    """Whether a committed cache holds every readable example of the recipe, in shards that are whole.

    Opens no file of the teacher.
    """
    assert recipe.cache is not None
    if not all(is_there(location) for location in recipe.cache.locations):
        return False
    try:
        cache = open_caches(recipe.cache)
    except CacheFormatError:
        return False  # the capture says what is wrong with it, and mends it where it can
    processor = _open_processor_of_keys(recipe)
    if processor is None:
        return False
    surveyors = Surveyors.of_capture(recipe)
    for name in captured_splits(recipe):
        keys = survey_keys(recipe.data, name, processor, surveyors).keys
        keys = keys[~are_skipped(keys, cache)]
        if not cache.contains(keys).all() or any(broken_shards(part, keys) for part in cache.parts):
            return False
    return True


def _open_processor_of_keys(recipe: Recipe) -> ExampleProcessor | None:
    """The student's, whose keys are its teacher's; of another tokenizer the teacher's, None where it is missing."""
    if not recipe.student.other_vocabulary:
        return open_processor_of(recipe, recipe.student.model, revision=recipe.student.revision)
    assert recipe.teacher is not None
    if recipe.teacher.trained_by is not None and not is_there(recipe.teacher.model):
        return None
    return _open_teacher_processor(_of_its_day(recipe))


def is_there(location: str) -> bool:
    """Whether a cache may lie there: remote ones are not asked."""
    return "://" in location or Path(location).exists()


def are_skipped(keys: np.ndarray, cache: Cache) -> np.ndarray:
    """(n,) bool, which of these keys the capture has left out."""
    return np.isin(as_key_array(keys), as_key_array([bytes.fromhex(key) for key in cache.skipped]))


def broken_shards(reader: CacheReader, keys: Keys | None = None, *, hashed: bool = True) -> list[str]:
    """Names of the shards that are gone or not what the manifest says, of those that hold any of the keys.

    keys    None: of all shards
    hashed  local files are hashed, as a reader does before their first use and only then: what is sound here
            is not hashed again there.  A remote file would have to be fetched: its size has to do
    """
    shards = reader.manifest.shards
    if keys is not None:
        found = reader.index.find(keys)
        holding, _ = reader.index.locate(found[found >= 0])
        shards = shards.take(np.unique(holding))
    folder, verified = open_folder(reader.location), VerifiedFiles() if hashed else None
    return [shard.name for shard in shards if not _is_whole(folder, shard, verified)]


def _is_whole(folder: Folder, shard: ShardInfo, verified: VerifiedFiles | None) -> bool:
    if folder.size(shard.name) != shard.bytes:
        return False
    if verified is not None and isinstance(folder, LocalFolder):
        try:
            verified.require(folder.path / shard.name, shard.sha256, where=folder.where)
        except CacheFormatError:
            return False
    return True
