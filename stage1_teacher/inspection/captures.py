"""What a cache's log tells of the captures that made it: when, how long, with what, by which recipe."""

from __future__ import annotations

import json
from typing import Any

from shared.cache.layout import LOG_NAME
from shared.cache.storage import open_folder


def capture_records(location: str) -> list[dict[str, Any]]:
    """The log's lines that hold a recipe, oldest first; empty where there are none, as in a merged cache.

    The log is no part of the cache: a damaged line is passed over.
    """
    try:
        lines = open_folder(location).read(LOG_NAME).splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("recipe"), dict) else None
