"""What a cache's log tells of the captures that made it: when, how long, with what, by which recipe."""

from __future__ import annotations

from typing import Any

from shared.cache.log import log_records
from shared.cache.storage import open_folder


def capture_records(location: str) -> list[dict[str, Any]]:
    """The log's lines that hold a recipe, oldest first; empty where there are none, as in a merged cache.

    The log is no part of the cache: a damaged line is passed over.
    """
    return [record for record in log_records(open_folder(location)) if isinstance(record.get("recipe"), dict)]
