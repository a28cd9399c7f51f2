"""What of a data set a cache holds, and whether its shards are whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.cache import Cache, CacheReader, open_caches
from shared.cache.index import Keys, as_key_array
from shared.cache.manifest import ShardInfo
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.cache.verified import VerifiedFiles
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, CacheMismatchError, listed
from shared.places import is_there
from shared.recipes import DataConfig, Recipe, Split
from shared.same_prompts import open_processor_of_keys, prompt_identity
from shared.surveying import Surveyors, survey_keys


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
    whose = "student" if processor.of_keys is processor else "teacher"
    return (
        f"{where}. The prompts differ from those of the cache:\n{listed(lines)}\nAsk as the cache does "
        f"(data.system_prompt, data.date, data.train_on, the {whose}'s chat template), or run teacher-cache again"
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
    processor = open_processor_of_keys(recipe)
    if processor is None:
        return False
    surveyors = Surveyors.of_capture(recipe)
    for name in captured_splits(recipe):
        keys = survey_keys(recipe.data, name, processor, surveyors).keys
        keys = keys[~are_skipped(keys, cache)]
        if not cache.contains(keys).all() or any(broken_shards(part, keys) for part in cache.parts):
            return False
    return True


def are_skipped(keys: np.ndarray, cache: Cache) -> np.ndarray:
    """(n,) bool, which of these keys the capture has left out."""
    return np.isin(as_key_array(keys), as_key_array([bytes.fromhex(key) for key in cache.skipped]))


def broken_shards(reader: CacheReader, keys: Keys | None = None, *, hashed: bool = True) -> list[str]:
    """Names of the shards that are gone or not what the manifest says, of those that hold any of the keys or nothing.

    keys    None: of all shards
    hashed  local files are hashed, as a reader does before their first use and only then: what is sound here
            is not hashed again there.  A remote file would have to be fetched: its size has to do
    """
    shards = reader.manifest.shards
    if keys is not None:
        found = reader.index.find(keys)
        holding, _ = reader.index.locate(found[found >= 0])
        is_asked = shards.column("examples") == 0
        is_asked[holding] = True
        shards = shards.take(np.flatnonzero(is_asked))
    folder, verified = open_folder(reader.location), VerifiedFiles() if hashed else None
    return [shard.name for shard in shards if not _is_whole(folder, shard, verified)]


def _is_whole(folder: Folder, shard: ShardInfo, verified: VerifiedFiles | None) -> bool:
    if folder.size(shard.name) != shard.bytes:
        return False
    if verified is not None and isinstance(folder, LocalFolder):
        try:
            verified.require(folder.path / shard.name, shard.sha256, where=folder.where)
        except (CacheFormatError, FileNotFoundError):  # another process may repair the cache meanwhile
            return False
    return True
