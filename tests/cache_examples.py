"""Small synthetic caches for the tests of ``shared.cache``: real rows, real payloads, no teacher."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from shared import codec
from shared.cache import (
    CacheReader,
    CacheWriter,
    DataSource,
    Identity,
    InputsIdentity,
    Manifest,
    Row,
    TargetsIdentity,
    TeacherIdentity,
)
from shared.cache.format import sha256_hex
from shared.cache.index import KeyIndex
from shared.cache.layout import LOCK_NAME, index_name
from shared.cache.manifest import content_hash
from shared.recipes.policies import Policy, Threshold, VisualGain
from shared.sparse import SparseTargets, position_seeds, sparsify

VOCAB_SIZE = 97
VERSIONS = {"teachonce": "0.1"}


def make_identity(
    *,
    policy: Policy | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    label_log_prob: bool = False,
    visual_gain: VisualGain | None = None,
    **changes,
) -> Identity:
    inputs = {
        "tokenizer_fingerprint": "t0",
        "template_fingerprint": "c0",
        "image_processor_fingerprint": "i0",
        "vocab_size": VOCAB_SIZE,
        "max_answer_tokens": 32,
    }
    inputs.update({name: changes.pop(name) for name in list(changes) if name in inputs})
    teacher = {"name": "teacher", "revision": None, "weights_fingerprint": "w0", "dtype": "float32"}
    teacher.update({name: changes.pop(name) for name in list(changes) if name in teacher})
    return Identity(
        teacher=TeacherIdentity(**teacher),
        inputs=InputsIdentity(**inputs),
        targets=TargetsIdentity(
            policy=policy or Threshold(tau=1 / 16),
            temperatures=temperatures,
            seed=0,
            label_log_prob=label_log_prob,
            visual_gain=visual_gain,
        ),
        data=changes.pop("data", (DataSource(name="drawn", split="train", fingerprint="d0", rows=1),)),
    )


def make_key(number: int) -> bytes:
    """Keys in no order; some end in zero bytes, some begin alike."""
    key = hashlib.blake2b(str(number % 1000).encode(), digest_size=16).digest()
    return (key[:13] + bytes(3)) if number % 5 == 0 else key


@lru_cache(maxsize=4096)
def make_example(number: int, identity: Identity | None = None) -> tuple[Row, SparseTargets]:
    """Row ``number`` and the targets that its payload encodes."""
    identity = identity or make_identity()
    key, size = make_key(number), 1 + number % 7
    generator = torch.Generator().manual_seed(number)
    logprobs = (3 * torch.randn(size, VOCAB_SIZE, generator=generator)).log_softmax(-1)
    targets = sparsify(
        logprobs,
        identity.targets.policy,
        temperatures=identity.targets.temperatures,
        seeds=position_seeds(identity.targets.seed, key, size),
    )
    answer = torch.randint(0, VOCAB_SIZE, (size,), generator=generator)
    label_logprobs = logprobs.gather(1, answer[:, None]).squeeze(1)
    gains = torch.randn(size, generator=generator).maximum(label_logprobs)
    row = Row(
        key=key,
        answer_ids=answer.numpy().astype(np.int32),
        num_entries=targets.num_entries,
        ce_sum=float(-logprobs.gather(1, answer[:, None]).sum()),
        entropy_sums=targets.entropy.sum(0).double().numpy(),
        payload=codec.encode(targets),
        truncated=number % 11 == 0,
        label_log_prob=label_logprobs.half().numpy(),
        label_gain=gains.half().numpy(),
    )
    return row, targets


def make_row(number: int, identity: Identity | None = None) -> Row:
    return make_example(number, identity)[0]


def keys_and_rows(numbers: Sequence[int]) -> list[tuple[bytes, int]]:
    return [(make_key(number), number) for number in numbers]


def capture(
    location: str | Path,
    numbers: Sequence[int],
    *,
    identity: Identity | None = None,
    examples_per_shard: int = 5,
    order: int = 1,
) -> Manifest:
    """A cache of these examples, its units captured in order, or backwards with ``order=-1``."""
    identity = identity or make_identity()
    with CacheWriter.open(str(location), identity, created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(numbers), examples_per_shard=examples_per_shard)
        for unit in plan.units[::order]:
            if not writer.is_finished(unit):
                with writer.unit(unit) as shard:
                    for number in unit.rows[::order]:
                        shard.add(make_row(int(number), identity))
        return writer.commit(plan)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, but the log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


def as_version_1(cache: Path) -> Manifest:
    """Makes a committed cache of at most one segment what version 1 would have written."""
    manifest = CacheReader(str(cache)).manifest
    shards = [shard.model_dump(mode="json") for shard in manifest.shards]
    columns = [
        (view.keys.copy(), view.num_positions)
        for view in map(CacheReader(str(cache)).shard, range(len(shards)))
    ]
    encoded = KeyIndex.from_shards(columns).encode()
    digest = sha256_hex(encoded)
    index = {"name": index_name(digest), "sha256": digest, "bytes": encoded.size}
    for file in manifest.files:
        (cache / file.name).unlink()
    (cache / index["name"]).write_bytes(encoded)
    tree = json.loads((cache / "manifest.json").read_text())
    del tree["segments"]
    tree |= {"format_version": 1, "index": index, "shards": shards}
    tree["totals"]["bytes"] = sum(shard["bytes"] for shard in shards) + encoded.size
    tree["sha256"] = content_hash(tree)
    (cache / "manifest.json").write_text(json.dumps(tree, sort_keys=True, indent=1) + "\n")
    return CacheReader(str(cache)).manifest


@contextmanager
def locked_by_another(folder: Path, text: str) -> Iterator[Callable[[], None]]:
    """Another process has the folder's lock, with this text in it, until what this gives is called, or the end."""
    fork = multiprocessing.get_context("fork")
    has_it, may_end = fork.Event(), fork.Event()
    folder.mkdir(parents=True, exist_ok=True)

    def hold() -> None:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.pwrite(descriptor, text.encode(), 0)
        has_it.set()
        may_end.wait()
        os._exit(0)

    process = fork.Process(target=hold, daemon=True)
    process.start()
    assert has_it.wait(timeout=60)

    def release() -> None:
        may_end.set()
        process.join()

    try:
        yield release
    finally:
        release()


class Clock:
    """Time that passes in sleeps alone; in the place of the module ``time``.

    at_sleep  called with the time after each
    """

    def __init__(self, at_sleep: Callable[[float], object] = lambda _: None) -> None:
        self.now, self._at_sleep = 0.0, at_sleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._at_sleep(self.now)
