"""How often an epoch fetches each shard of a remote cache, by the order of its examples.

    python -m tests.benchmarks.bench_staging [--shards 1000] [--room 50]

The cache lies on an S3 server on this machine.  The staging folder has room for some of the shards.  An order of the
whole epoch is stopped after so many examples as there are shards, since it fetches nearly one for each.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np

from shared.cache import CacheReader, Staging
from shared.cache import reader as reader_module
from shared.permutation import Permutation, stream
from shared.shard_order import ShardLayout, ShardOrder, window_of
from tests.benchmarks.bench_cache import make_key, write_cache
from tests.benchmarks.tables import Bench

EXAMPLES_PER_SHARD = 16
READ_TOGETHER = 16  # a step's examples
MAX_OPEN_SHARDS = 2  # these are tiny: of ordinary size, a reader holds on to few beyond what is staged
BUCKET = "bench"


@contextmanager
def s3_server() -> Iterator[None]:
    from moto.server import ThreadedMotoServer  # Flask, which is slow to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    try:
        yield
    finally:
        server.stop()


def fetches(
    location: str, staging: Staging, order: Any, keys: list[bytes], *, num_examples: int
) -> Counter[str]:
    """By name, of what is fetched while so many examples are read in that order."""
    fetched: Counter[str] = Counter()
    download = Staging._download

    def counted(self: Staging, source: Any, name: str, *args: Any, **options: Any) -> None:
        fetched[name] += 1
        download(self, source, name, *args, **options)

    open_shards = mock.patch.object(reader_module, "MAX_OPEN_SHARDS", MAX_OPEN_SHARDS)
    with mock.patch.object(Staging, "_download", counted), open_shards:
        reader = CacheReader(location, staging=staging)
        for first in range(0, num_examples, READ_TOGETHER):
            places = np.arange(first, min(first + READ_TOGETHER, num_examples))
            reader.rows([keys[example] for example in order[places]])
    for file in reader.manifest.files:
        fetched.pop(file.name, None)
    return fetched


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches of shards, by the order of examples")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--room", type=int, default=50, help="shards that the staging folder holds")
    chosen = parser.parse_args()
    bench, rows = Bench("staging"), []
    num_examples = chosen.shards * EXAMPLES_PER_SHARD
    keys = [make_key(number) for number in range(num_examples)]
    with s3_server(), tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "cache")
        write_cache(local, examples=num_examples, examples_per_shard=EXAMPLES_PER_SHARD, num_positions=4)
        fsspec.filesystem("s3").mkdir(BUCKET)
        fsspec.filesystem("s3").put(f"{local}/", f"{BUCKET}/cache/", recursive=True)
        location = f"s3://{BUCKET}/cache"
        manifest = CacheReader(str(local)).manifest
        sizes = [shard.bytes for shard in manifest.shards]
        room = chosen.room * max(sizes)
        window = window_of(sizes, room=room)
        layout = ShardLayout.of(CacheReader(str(local)).shards(keys))
        orders = {
            "of the whole epoch": (Permutation(num_examples, key=stream(1, 0)), chosen.shards),
            f"by windows of {window} shards": (
                ShardOrder(layout, window=window, key=stream(1, 0)),
                num_examples,
            ),
        }
        for name, (order, number) in orders.items():
            with tempfile.TemporaryDirectory() as staged:
                fetched = fetches(
                    location,
                    Staging(staged, max_bytes=room + sum(file.bytes for file in manifest.files)),
                    order,
                    keys,
                    num_examples=number,
                )
            total, is_whole = fetched.total(), number == num_examples
            rate = f"{total / number * EXAMPLES_PER_SHARD:.2f}"
            most = f", at most {max(fetched.values())}" if is_whole else ""
            read = f"{number:,}" if is_whole else f"{number:,}, then stopped"
            rows.append([name, read, f"{total:,}", f"{rate}{most}"])
    notes = f"{chosen.shards:,} shards of {EXAMPLES_PER_SHARD} examples, room for {chosen.room} of them."
    head = ("order", "examples read", "fetches", "fetches of a shard in an epoch")
    bench.show("staging", "Fetches of a remote cache's shards", head, rows, notes=notes)


if __name__ == "__main__":
    main()
