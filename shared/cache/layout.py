"""The files of a cache's folder and their names.

manifest.json               makes the folder a cache; written last
index-<sha256>.arrow        the sorted table of keys
shards/<unit>-<sha256>.arrow
plan.arrow                  while a capture is under way
capture.lock                while a process captures
log.jsonl                   times, speeds, hosts; read by people only
"""

from __future__ import annotations

from shared.cache.storage import Folder

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.arrow"
LOCK_NAME = "capture.lock"
LOG_NAME = "log.jsonl"
INDEX_PREFIX = "index-"
SHARDS = "shards/"


def index_name(sha256: str) -> str:
    """What an index is called: indices of an old and a new manifest lie side by side for a while."""
    return f"{INDEX_PREFIX}{sha256[:16]}.arrow"


def shard_name(unit_id: str, sha256: str) -> str:
    """What a shard is called: by what it should hold, and by what it does hold."""
    return f"{SHARDS}{unit_id}-{sha256}.arrow"


def unit_in(name: str) -> str:
    """The unit's id in a shard's name."""
    return name.removeprefix(SHARDS).partition("-")[0]


def sha256_in(name: str) -> str:
    """The hash in a shard's name."""
    return name.removesuffix(".arrow").rpartition("-")[2]


def foreign_names(folder: Folder) -> list[str]:
    """Files that no cache has, hidden ones left out."""
    known = {MANIFEST_NAME, PLAN_NAME, LOCK_NAME, LOG_NAME}
    return [
        name for name in folder.names("") if name not in known and not name.startswith((INDEX_PREFIX, "."))
    ]
