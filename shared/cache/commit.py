"""From old shards and captured units to a manifest and its index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from shared.cache.format import sha256_hex
from shared.cache.identity import Identity
from shared.cache.index import KeyIndex, ShardColumns
from shared.cache.layout import MANIFEST_NAME, index_name, sha256_in
from shared.cache.manifest import IndexInfo, Manifest, ShardInfo, SkippedRow
from shared.cache.plan import Plan, Unit
from shared.cache.shard import ShardView, open_shard
from shared.cache.storage import Folder
from shared.errors import CacheFormatError


def assemble(
    plan: Plan,
    base: Manifest | None,
    base_index: KeyIndex,
    *,
    names: Mapping[str, str],
    open_view: Callable[[str], ShardView],
    created_by: Mapping[str, str],
    where: str,
) -> tuple[Manifest, pa.Buffer]:
    """The manifest of the old shards and the plan's units, old ones first, and the bytes of its index.

    ``names``: unit id -> the name of its shard
    Raises   CacheFormatError  when two shards hold the same example
    """
    shards: list[ShardInfo] = []
    columns: list[ShardColumns] = []
    skipped: list[SkippedRow] = []
    old_columns = base_index.shard_columns()
    for old_place, source in _sources(plan, base):
        if isinstance(source, ShardInfo):
            shards.append(source)
            columns.append(old_columns[old_place])
            continue
        name = names[source.unit_id]
        view = open_view(name)
        shards.append(shard_info(name, view))
        columns.append((view.keys, view.num_positions))
        skipped += [SkippedRow(**row) for row in view.metadata["skipped"]]
    index = KeyIndex.from_shards(columns)
    info, encoded = encode_index(index, where=where)
    manifest = Manifest.build(
        identity=grown_identity(base, plan.identity),
        index=info,
        shards=shards,
        skipped=[*_older_skips(base, plan.identity), *plan.skipped, *skipped],
        duplicates=plan.duplicates,
        created_by=created_by,
    )
    return manifest, encoded


def rebuild_index(folder: Folder, manifest: Manifest) -> pa.Buffer:
    """The bytes of the index that a manifest names, from its shards, whose hashes are checked.

    Raises   CacheFormatError  when a shard is missing or damaged as well, or the bytes come out otherwise
    """
    remedy = f"Delete {MANIFEST_NAME} and run teacher-cache again: it keeps the whole shards that its new plan has."
    columns: list[ShardColumns] = []
    for place, shard in enumerate(manifest.shards):
        where = f"{folder.where}, shard {place:05d} ({shard.name})"
        try:
            data = folder.read(shard.name)
        except FileNotFoundError:
            data = b""
        if sha256_hex(data) != shard.sha256:
            raise CacheFormatError(
                f"{where}: is missing or damaged, and so is the index, which alone knows its keys. {remedy}"
            )
        view = open_shard(data, where=where)
        columns.append((view.keys, view.num_positions))
    info, encoded = encode_index(KeyIndex.from_shards(columns), where=folder.where)
    if info != manifest.index:  # another release of Arrow may spell the same table otherwise
        raise CacheFormatError(
            f"{folder.where}, {manifest.index.name}: is missing or damaged, and made again from the shards "
            f"it has sha256 {info.sha256[:12]}, not that of the manifest ({manifest.index.sha256[:12]}). {remedy}"
        )
    return encoded


def encode_index(index: KeyIndex, *, where: str) -> tuple[IndexInfo, pa.Buffer]:
    """The entry and the bytes of an index file.  Raises CacheFormatError when a key occurs twice."""
    twice = index.duplicates()
    if twice:
        raise CacheFormatError(
            f"{where}: example {twice[0].hex()} lies in two shards ({len(twice)} such examples). Capture the "
            "cache again in an empty folder."
        )
    encoded = index.encode()
    digest = sha256_hex(encoded)
    return IndexInfo(name=index_name(digest), sha256=digest, bytes=encoded.size), encoded


def shard_info(name: str, view: ShardView) -> ShardInfo:
    """A shard's entry in the manifest."""
    return ShardInfo(
        name=name,
        sha256=sha256_in(name),
        bytes=view.num_bytes,
        examples=len(view),
        positions=int(view.num_positions.sum(dtype=np.int64)),
        entries=int(view.num_entries.sum(dtype=np.int64)),
        truncated=int(view.truncated.sum()),
    )


def grown_identity(base: Manifest | None, identity: Identity) -> Identity:
    """The identity, with those data of the old manifest that it does not list anew."""
    if base is None:
        return identity
    listed = {(source.name, source.split) for source in identity.data}
    kept = [source for source in base.identity.data if (source.name, source.split) not in listed]
    return identity.model_copy(update={"data": (*kept, *identity.data)})


def _older_skips(base: Manifest | None, identity: Identity) -> Sequence[SkippedRow]:
    """Skipped rows of the old manifest, unless this capture speaks for all the data again."""
    speaks_for_all = len(grown_identity(base, identity).data) == len(identity.data)
    return () if base is None or speaks_for_all else base.skipped


def _sources(plan: Plan, base: Manifest | None) -> Iterator[tuple[int, ShardInfo | Unit]]:
    """The shards in their new order, with the old place of old ones and -1 for others."""
    repairs = {unit.slot: unit for unit in plan.units if unit.slot is not None}
    for place, shard in enumerate(() if base is None else base.shards):
        if place in repairs:
            yield -1, repairs[place]
        elif place not in plan.lost:
            yield place, shard
    for unit in plan.units:
        if unit.slot is None:
            yield -1, unit
