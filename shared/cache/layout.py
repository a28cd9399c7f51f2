"""The files of a cache's folder and their names.

manifest.json               makes the folder a cache; written last
list-<sha256>.arrow         shards of one segment
index-<sha256>.arrow        their keys, sorted
shards/<unit>-<sha256>.arrow
plan.arrow                  while a capture is under way
claims/                     while a capture is under way: who does what
capture.lock                while a process has the folder to itself
log.jsonl                   times, speeds, hosts; read by people only
capture.log                 what libraries said while it was captured
"""

from __future__ import annotations

import re
from pathlib import Path

from shared.cache.storage import Folder
from shared.errors import CacheFormatError

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.arrow"
LOCK_NAME = "capture.lock"
LOG_NAME = "log.jsonl"
LIBRARY_LOG_NAME = "capture.log"
INDEX_PREFIX = "index-"
LIST_PREFIX = "list-"
SHARDS = "shards/"
CLAIMS = "claims/"
# Only what is named like this is ever removed: other programs have folders called "shards", too.
TABLE_NAME = re.compile(r"(index|list)-[0-9a-f]{16}\.arrow")
SHARD_NAME = re.compile(r"shards/[0-9a-f]{16}-[0-9a-f]{64}\.arrow")
CLAIM_NAME = re.compile(r"claims/([0-9a-f]{16}|commit)\.([0-9]{1,6})")
CLAIMANT_NAME = re.compile(r"claims/[A-Za-z0-9-][A-Za-z0-9_.-]*\.json")  # not a temporary one


def index_name(sha256: str) -> str:
    """What an index is called: indices of an old and a new manifest lie side by side for a while."""
    return f"{INDEX_PREFIX}{sha256[:16]}.arrow"


def list_name(sha256: str) -> str:
    """What a list of shards is called."""
    return f"{LIST_PREFIX}{sha256[:16]}.arrow"


def shard_name(unit_id: str, sha256: str) -> str:
    """What a shard is called: by what it should hold, and by what it does hold."""
    return f"{SHARDS}{unit_id}-{sha256}.arrow"


def unit_in(name: str) -> str:
    """The unit's id in a shard's name."""
    return name.removeprefix(SHARDS).partition("-")[0]


def sha256_in(name: str) -> str:
    """The hash in a shard's name."""
    return name.removesuffix(".arrow").rpartition("-")[2]


def claim_name(task: str, generation: int) -> str:
    """What a claim is called: by its task, a unit's id or ``commit``, and by how often it was taken over."""
    return f"{CLAIMS}{task}.{generation}"


def claimant_file(name: str) -> str:
    """The file of one process that takes part in a capture."""
    return f"{CLAIMS}{name}.json"


def table_names(folder: Folder) -> list[str]:
    """The lists and indices that lie in a folder, whether a manifest names them or not."""
    names = [*folder.names(INDEX_PREFIX), *folder.names(LIST_PREFIX)]
    return [name for name in names if TABLE_NAME.fullmatch(name)]


def shard_names(folder: Folder) -> list[str]:
    """The shards that lie in a folder, whether a manifest names them or not."""
    return [name for name in folder.names(SHARDS) if SHARD_NAME.fullmatch(name)]


def foreign_names(folder: Folder) -> list[str]:
    """Files that no cache has, hidden ones left out."""
    known = {MANIFEST_NAME, PLAN_NAME, LOCK_NAME, LOG_NAME, LIBRARY_LOG_NAME}
    known |= {*table_names(folder), *shard_names(folder)}
    names = [*folder.names(""), *folder.names(SHARDS)]
    return [name for name in names if name not in known and not name.removeprefix(SHARDS).startswith(".")]


def require_no_other_files(folder: Folder) -> None:
    """Raises   CacheFormatError  where a folder without a manifest and a plan holds what no cache has"""
    if foreign := foreign_names(folder):
        raise CacheFormatError(
            f"{folder.where}: holds {foreign[0]!r} but no {MANIFEST_NAME}; this is no cache. Name an empty folder."
        )


def require_in_no_cache(path: Path) -> None:
    """For a new folder.

    Raises   CacheFormatError  where it would lie in a cache, and be copied, moved and deleted with it
    """
    for folder in path.absolute().resolve().parents:
        if (folder / MANIFEST_NAME).is_file() and (folder / SHARDS).is_dir():
            raise CacheFormatError(f"{path}: lies in the cache {folder}. Name a folder outside of it.")
