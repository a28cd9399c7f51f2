"""A cache of very many shards: what its manifest takes, opening it, and adding one more shard.

    python -m tests.benchmarks.bench_manifest [--shards 1000 10000 100000] [--examples 8]

The old shards are empty files under the names of the list: neither opening nor growing a cache reads them.
Of version 1, which is no longer written, the manifest and what opening it takes are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from shared.cache import CacheReader, CacheWriter, Manifest, Row
from shared.cache.commit import Contents, NewShard
from shared.cache.format import sha256_hex
from shared.cache.index import KeyIndex
from shared.cache.layout import index_name, shard_name
from shared.cache.manifest import content_hash
from shared.cache.shard_list import ShardInfo
from shared.cache.storage import LocalFolder
from tests.benchmarks.bench_cache import IDENTITY, in_own_process, make_key, make_rows, peak_gib
from tests.benchmarks.tables import Bench

HEAD = ("shards", "format version", "manifest", "open it", "memory", "one more shard", "written for it")
POSITIONS = 100
APPENDED = 10


def drawn_shards(num_shards: int, examples: int) -> list[NewShard]:
    generator = np.random.default_rng(0)
    shards = []
    for _ in range(num_shards):
        unit, sha256 = generator.bytes(8).hex(), generator.bytes(32).hex()
        info = ShardInfo(
            name=shard_name(unit, sha256),
            sha256=sha256,
            bytes=20 * POSITIONS * examples,
            examples=examples,
            positions=POSITIONS * examples,
            entries=5 * POSITIONS * examples,
            truncated=0,
        )
        keys = np.frombuffer(generator.bytes(16 * examples), "S16")
        shards.append(NewShard(info, (keys, np.full(examples, POSITIONS, np.uint32))))
    return shards


def write_cache(path: Path, new: list[NewShard]) -> None:
    folder, contents = LocalFolder(path), Contents.of_new(new)
    segments = contents.write_segments(folder.publish, where="cache")
    manifest = Manifest.build(
        identity=IDENTITY,
        segments=segments,
        shards=contents.shards,
        skipped=(),
        duplicates=0,
        created_by={},
    )
    folder.publish("manifest.json", manifest.dumps())
    (path / "shards").mkdir()
    for shard in new:
        (path / shard.info.name).touch()


def write_version_1(path: Path, new: list[NewShard], like: Path) -> None:
    """The same cache as version 1 had it."""
    encoded = KeyIndex.from_shards([shard.columns for shard in new]).encode()
    index = {"name": index_name(sha256_hex(encoded)), "sha256": sha256_hex(encoded), "bytes": encoded.size}
    tree = json.loads((like / "manifest.json").read_text())
    del tree["segments"]
    tree |= {"format_version": 1, "index": index, "shards": [shard.info.model_dump() for shard in new]}
    tree["sha256"] = content_hash(tree)
    folder = LocalFolder(path)
    folder.publish(str(index["name"]), encoded)
    folder.publish("manifest.json", (json.dumps(tree, sort_keys=True, indent=1) + "\n").encode())


def opened(path: Path, small: Path) -> dict[str, float]:
    """Seconds, and MiB more at the peak, of opening a cache and looking up ten shards; after those of a small one."""
    assert CacheReader(str(small)).manifest.shards[0].examples
    before, begin = peak_gib(), time.perf_counter()
    reader = CacheReader(str(path))
    num_shards = len(reader.manifest.shards)
    ten = [reader.manifest.shards[place].name for place in range(0, num_shards, num_shards // 10)]
    assert len(ten) >= 10
    return {"seconds": time.perf_counter() - begin, "mib": 1024 * (peak_gib() - before)}


def appended(path: Path) -> dict[str, float]:
    """Of one more shard of one example, committed alone: seconds and bytes written, the mean of some."""
    (row, *_), written = make_rows(4), 0
    publish = LocalFolder.publish

    def counted(self: LocalFolder, name: str, data: bytes) -> None:
        nonlocal written
        written += len(data)
        publish(self, name, data)

    begin = time.perf_counter()
    with mock.patch.object(LocalFolder, "publish", counted):
        for number in range(APPENDED):
            with CacheWriter.open(str(path), IDENTITY, created_by={}) as writer:
                plan = writer.plan([(make_key(number), number)], examples_per_shard=1)
                with writer.unit(plan.units[0]) as shard:
                    shard.add(Row(key=make_key(number), **row))
                writer.commit(plan)
    return {"seconds": (time.perf_counter() - begin) / APPENDED, "bytes": written / APPENDED}


def main() -> None:
    parser = argparse.ArgumentParser(description="A cache of very many shards")
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--examples", type=int, default=8, help="of a shard")
    chosen = parser.parse_args()
    bench, rows = Bench("manifest"), []
    for num_shards in chosen.shards:
        with tempfile.TemporaryDirectory() as temporary:
            small, first, second = (Path(temporary) / name for name in ("small", "1", "2"))
            write_cache(small, drawn_shards(2, chosen.examples))
            new = drawn_shards(num_shards, chosen.examples)
            write_cache(second, new)
            write_version_1(first, new, second)
            for version, path in ((1, first), (2, second)):
                size = (path / "manifest.json").stat().st_size
                found = in_own_process(opened, path=path, small=small)
                cells = [f"{size / 1000:,.1f} kB", f"{found['seconds']:.3f} s", f"{found['mib']:.1f} MiB"]
                if version == 2:
                    more = in_own_process(appended, path=path)
                    cells += [f"{more['seconds']:.2f} s", f"{more['bytes'] / 1000:,.0f} kB"]
                else:
                    cells += ["-", "-"]
                rows.append([f"{num_shards:,}", f"{version}", *cells])
                print("  " + ", ".join(rows[-1]), file=sys.stderr, flush=True)
    notes = f"{chosen.examples} examples a shard. Memory is what opening adds to a process."
    bench.show("manifest", "A cache of very many shards", HEAD, rows, notes=notes)


if __name__ == "__main__":
    main()
