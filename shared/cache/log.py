"""A cache's log, ``log.jsonl``: one JSON object a line.  It is no part of the cache, and may be damaged or gone."""

from __future__ import annotations

import json
from typing import Any

from shared.cache.layout import LOG_NAME
from shared.cache.storage import Folder

MAX_LOG_BYTES = 1 << 30  # some 400,000 captures


def read_log(folder: Folder) -> bytes:
    """Empty where there is none.

    Raises   CacheFormatError  when it is larger than a log can be, or no file
    """
    try:
        return folder.read(LOG_NAME, max_bytes=MAX_LOG_BYTES)
    except FileNotFoundError:
        return b""


def log_records(folder: Folder) -> list[dict[str, Any]]:
    """Its lines, oldest first; those that are no JSON object are passed over."""
    found = []
    for line in read_log(folder).split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
