"""What a recipe's ``cache`` section names: one cache, a list of several, or a mix.

cache = open_caches(recipe.cache)
cache.rows(keys), cache.targets(rows)
"""

from __future__ import annotations

from shared.cache.cache_list import CacheList
from shared.cache.cache_mix import CacheMix
from shared.cache.reader import CacheReader
from shared.cache.staging import Staging
from shared.recipes import CacheConfig

Cache = CacheReader | CacheList | CacheMix


def open_caches(config: CacheConfig, *, staging: Staging | None = None) -> Cache:
    """What a recipe's ``cache`` section names: one cache, a list, or a mix.

    Raises   CacheFormatError, CacheMismatchError  as they do
    """
    if config.mix is not None:
        return CacheMix(config.locations, weights=config.weights, staging=staging)
    if config.is_one:
        return CacheReader(config.location, staging=staging)
    return CacheList(
        config.locations, duplicates=config.duplicates, teachers=config.teachers, staging=staging
    )
