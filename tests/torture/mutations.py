"""Files that vouch for themselves and say something else: what a stranger can write."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.cache.format import sha256_hex
from shared.cache.layout import shard_name
from shared.cache.manifest import content_hash
from shared.cache.shard_list import SCHEMA

OTHERS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**70, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x" * 99, "../x", "/dev/zero", "\ud800", "<script>", "nan"),
    *([], {}, [[]] * 9, {"kind": "top_k"}, [None], {"": {}}),
)


def mutate(tree: Any, chance: random.Random) -> Any:
    """A JSON tree with one place changed to something else."""
    if isinstance(tree, dict) and tree and chance.random() < 0.9:
        name = chance.choice(sorted(tree))
        if chance.random() < 0.1:
            return {key: value for key, value in tree.items() if key != name}
        return tree | {name: mutate(tree[name], chance)}
    if isinstance(tree, list) and tree and chance.random() < 0.9:
        place = chance.randrange(len(tree))
        return [*tree[:place], mutate(tree[place], chance), *tree[place + 1 :]]
    if isinstance(tree, int) and chance.random() < 0.5:
        return tree + chance.choice([-1, 1, 2**31, -tree])
    return chance.choice(OTHERS)


def flip(data: bytes, chance: random.Random, *, most: int = 3) -> bytes:
    """With one to some bits flipped."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, most)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def forge(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A changed manifest that vouches for itself."""
    path = cache / "manifest.json"
    tree = json.loads(path.read_text())
    changed = change(tree)
    tree = changed if isinstance(changed, dict) else tree
    try:
        tree["sha256"] = content_hash(tree)
    except ValueError:  # NaN and infinity have no canonical form
        tree["sha256"] = "0" * 64
    path.write_text(json.dumps(tree))


def forge_list(cache: Path, change: Callable[[dict[str, list[Any]]], object]) -> None:
    """A changed list of the first shards, as a dictionary of its columns, which the manifest vouches for."""
    file = json.loads((cache / "manifest.json").read_text())["segments"][0]["list"]
    columns = pa.ipc.open_file((cache / file["name"]).read_bytes()).read_all().to_pydict()
    change(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as stream:
        stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
    forge_table(cache, "list", sink.getvalue().to_pybytes())


def forge_table(cache: Path, kind: str, data: bytes) -> None:
    """Another first ``list`` or ``index``, which the manifest vouches for."""

    def change(tree: dict[str, Any]) -> None:
        digest = sha256_hex(data)
        name = f"{kind}-{digest[:16]}.arrow"
        (cache / name).write_bytes(data)
        tree["segments"][0][kind] = {"name": name, "sha256": digest, "bytes": len(data)}

    forge(cache, change)


def forge_shard(cache: Path, data: bytes) -> None:
    """Another first shard, which the list vouches for, and the manifest for the list."""

    def change(columns: dict[str, list[Any]]) -> None:
        digest = sha256_hex(data)
        (cache / shard_name(columns["unit"][0].hex(), digest)).write_bytes(data)
        columns["sha256"][0], columns["bytes"][0] = bytes.fromhex(digest), len(data)

    forge_list(cache, change)


def with_digest(tree: Any, *, name: str) -> Any:
    """JSON of a run that carries a hash of itself."""
    if not isinstance(tree, dict) or name not in tree:
        return tree
    rest = {key: value for key, value in tree.items() if key != name}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {name: hashlib.sha256(text.encode()).hexdigest()}
