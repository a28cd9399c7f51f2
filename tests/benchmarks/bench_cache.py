"""Figures of the cache: opening and streaming a large one, and cost against the number of shards.

    python -m tests.benchmarks.bench_cache                        (a million examples of 4 positions; two minutes)
    python -m tests.benchmarks.bench_cache --positions 64         (answers of usual length; 2 GB of disk)

Payloads are real ones, drawn once and used again under other keys.  Each figure is taken in a process of its
own, whose peak resident memory (torch and all) is what the kernel says.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared import codec
from shared.cache import (
    CacheReader,
    CacheWriter,
    Identity,
    InputsIdentity,
    Row,
    TargetsIdentity,
    TeacherIdentity,
)
from shared.cache.verify import verify
from shared.recipes.policies import Threshold
from shared.sparse import position_seeds, sparsify
from tests.benchmarks.tables import FIGURES, Bench, figure

VOCAB_SIZE = 4096
DISTINCT = 256
READ_TOGETHER = 256
IDENTITY = Identity(
    teacher=TeacherIdentity(name="drawn", revision=None, weights_fingerprint="0", dtype="float32"),
    inputs=InputsIdentity(
        tokenizer_fingerprint="0",
        template_fingerprint="0",
        image_processor_fingerprint="0",
        vocab_size=VOCAB_SIZE,
        max_answer_tokens=None,
    ),
    targets=TargetsIdentity(policy=Threshold(tau=1 / 64), temperatures=(1.0,), seed=0),
    data=(),
)


def make_key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def make_rows(num_positions: int) -> list[dict[str, Any]]:
    """All of a row but its key, ``DISTINCT`` times."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(DISTINCT):
        scale = 2 + 8 * torch.rand(num_positions, 1, generator=generator)
        logprobs = (scale * torch.randn(num_positions, VOCAB_SIZE, generator=generator)).log_softmax(-1)
        seeds = position_seeds(0, make_key(number), num_positions)
        targets = sparsify(logprobs, IDENTITY.targets.policy, seeds=seeds)
        row = {
            "answer_ids": torch.randint(0, VOCAB_SIZE, (num_positions,), generator=generator).int().numpy(),
            "num_entries": targets.num_entries,
            "ce_sum": 1.0,
            "entropy_sums": targets.entropy.double().sum(0).numpy(),
            "payload": codec.encode(targets),
        }
        rows.append(row)
    return rows


def write_cache(path: Path, *, examples: int, examples_per_shard: int, num_positions: int) -> None:
    rows = make_rows(num_positions)
    with CacheWriter.open(str(path), IDENTITY, created_by={}) as writer:
        pairs = ((make_key(number), number) for number in range(examples))
        plan = writer.plan(pairs, examples_per_shard=examples_per_shard)
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for key, number in zip(unit.keys, unit.rows, strict=True):
                    shard.add(Row(key=key, **rows[number % DISTINCT]))
        writer.commit(plan)


def batches(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), READ_TOGETHER):
        yield keys[start : start + READ_TOGETHER]


def stream(path: Path, *, shuffled: bool, most: int | None = None) -> dict[str, float]:
    """Opens a cache and reads and decodes its rows, in stored or in random order."""
    before_gib = peak_gib()
    start = time.perf_counter()
    reader = CacheReader(str(path))
    found = make_key(0) in reader
    opened_s = time.perf_counter() - start
    assert found
    keys = [make_key(number) for number in range(len(reader))]
    if shuffled:
        np.random.default_rng(0).shuffle(keys)
    start, positions = time.perf_counter(), 0
    for batch in batches(keys[:most]):
        positions += reader.read(batch)[1].num_positions
    return {
        "open_s": opened_s,
        "positions_per_s": positions / (time.perf_counter() - start),
        "peak_gib": peak_gib(),
        "peak_before_gib": before_gib,
    }


def peak_gib() -> float:
    """Of this process alone; ``ru_maxrss`` would begin with what its parent had."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 2**20


def _send(function: Callable[..., Any], pipe: Any, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    pipe.send(function(**arguments))


def in_own_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """The function's result from a fresh interpreter."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, there, arguments))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def bench_large(bench: Bench, folder: Path, *, examples: int, num_positions: int) -> None:
    start = time.perf_counter()
    path = folder / "large"
    write_cache(path, examples=examples, examples_per_shard=512, num_positions=num_positions)
    totals = CacheReader(str(path)).manifest.totals
    rows = [figure("written in", time.perf_counter() - start, ".0f", unit=" s")]
    for shuffled, most in ((False, None), (True, 100_000)):
        figures = in_own_process(stream, path=path, shuffled=shuffled, most=most)
        order = "random" if shuffled else "stored"
        read = f"{min(most or examples, examples):,} examples in {order} order"
        before = f" ({figures['peak_before_gib']:.2f} before the first use)"
        rows += [
            figure(f"opened in, for {read}", figures["open_s"], ".2f", unit=" s", most=2),
            figure(f"positions decoded a second and core, {read}", figures["positions_per_s"], ",.0f"),
            figure(f"peak memory, {read}", figures["peak_gib"], ".2f", unit=" GiB", more=before, most=1),
        ]
    shutil.rmtree(path)
    notes = f"{examples:,} examples of {num_positions} positions, {totals.bytes / 2**30:.2f} GiB."
    bench.show("cache", "A large cache: opened and streamed", FIGURES, rows, notes=notes)


def timed(function: Callable[..., Any], **arguments: Any) -> float:
    start = time.perf_counter()
    function(**arguments)
    return time.perf_counter() - start


def bench_linearity(bench: Bench, folder: Path, *, examples_per_shard: int, num_positions: int) -> None:
    rows = []
    for shards in (10, 100, 1000):
        path = folder / f"shards{shards}"
        examples = shards * examples_per_shard
        write_cache(
            path, examples=examples, examples_per_shard=examples_per_shard, num_positions=num_positions
        )
        kib = CacheReader(str(path)).manifest.totals.bytes / 1024
        seconds = (
            timed(CacheReader, location=str(path)),
            timed(verify, location=str(path)),
            timed(stream, path=path, shuffled=False),
        )
        rows.append([f"{shards:,}", f"{kib:,.0f}", *(f"{s:.3f} ({1e6 * s / kib:.1f})" for s in seconds)])
        shutil.rmtree(path)
    notes = (
        f"Shards of {examples_per_shard} examples of {num_positions} positions. Seconds, microseconds a KiB in "
        "brackets; to reach is a time that grows no faster than the bytes."
    )
    head = ("shards", "KiB", "open", "verify", "read")
    bench.show("cache-shards", "A cache by the number of its shards", head, rows, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--positions", type=int, default=4, help="of each example of the large cache")
    parser.add_argument(
        "--folder", type=Path, help="where the caches are written; default: a temporary folder"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench("cache")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench_large(bench, Path(folder), examples=arguments.examples, num_positions=arguments.positions)
        bench_linearity(bench, Path(folder), examples_per_shard=64, num_positions=16)


if __name__ == "__main__":
    main()
