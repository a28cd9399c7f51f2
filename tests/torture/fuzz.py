"""Bytes made by a fuzzer, for what reads a cache: guided by coverage where atheris is installed, else by chance.

    python -m tests.torture.fuzz decode --seconds=60 --seed=1       # one target, in a process of its own

A target may refuse with an error of ours.  Anything else, ten seconds or too much memory, is a failure; the bytes
that did it are printed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.torture.cases import Outcome, Result

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 12.0  # of one case
TARGETS = ("decode", "manifest", "shard", "index", "list", "plan", "yaml")
LEAST_S = 20.0  # to import and instrument
MEMORY_MIB = 4096


def fuzz_case(things: Any, number: int, chance: random.Random, folder: Path) -> Result:
    """One target, for some seconds."""
    target, seed = TARGETS[number % len(TARGETS)], chance.randrange(1, 2**31)
    command = [sys.executable, "-m", "tests.torture.fuzz", target, f"--seconds={SECONDS}", f"--seed={seed}"]
    command.append(f"--cache={things.cache}")
    what = f"fuzzing {target}, {'by coverage' if has_atheris() else 'by chance'}, seed {seed}"
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS * 4 + 60, check=False
        )
    except subprocess.TimeoutExpired as error:
        return Result(Outcome.HUNG, what, str(error.stdout))
    said = done.stdout + done.stderr
    tried = re.findall(r"number_of_executed_units: (\d+)", said)
    if done.returncode != 0 or not tried:
        hung = "libFuzzer: timeout" in said
        return Result(Outcome.HUNG if hung else Outcome.WRONG, what, said)
    return Result(Outcome.REFUSED, what, cases=int(tried[-1]))


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, required=True, help="whose files to begin with")
    arguments = parser.parse_args()
    if not has_atheris():
        _by_chance(arguments.target, arguments.cache, seconds=arguments.seconds, seed=arguments.seed)
        return
    import atheris

    with atheris.instrument_imports(include=["shared.cache", "shared.codec", "shared.recipes"]):
        target, corpus = target_of(arguments.target, arguments.cache)
    with tempfile.TemporaryDirectory() as folder:
        for place, data in enumerate(corpus):
            (Path(folder) / str(place)).write_bytes(data)
        options = {
            "max_total_time": int(arguments.seconds),
            "seed": arguments.seed,
            "timeout": 10,
            "rss_limit_mb": MEMORY_MIB,
            "print_final_stats": 1,
            "max_len": max(4096, *map(len, corpus)),
            "artifact_prefix": f"{tempfile.gettempdir()}/",
        }
        atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), folder], target)
        atheris.Fuzz()


def _by_chance(name: str, cache: Path, *, seconds: float, seed: int) -> None:
    from tests.torture.mutations import flip

    target, corpus = target_of(name, cache)
    chance, begin, tried = random.Random(seed), time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        data = chance.choice(corpus)
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data) + 1)]
        data = flip(data, chance, most=8) if data else data
        try:
            target(data)
        except BaseException:
            print("Base64:", base64.b64encode(data).decode(), flush=True)
            raise
        tried += 1
    print(f"number_of_executed_units: {tried}")


def target_of(name: str, cache: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """What reads the bytes, and sound ones to begin with."""
    from shared.cache.index import open_index
    from shared.cache.manifest import Manifest, content_hash
    from shared.cache.plan import Plan
    from shared.cache.shard import open_shard
    from shared.cache.shard_list import open_list
    from shared.errors import TeachonceError
    from shared.recipes import yaml12

    manifest = (cache / "manifest.json").read_bytes()
    shards = [path.read_bytes() for path in sorted((cache / "shards").iterdir())[:2]]
    (index,) = (path.read_bytes() for path in cache.glob("index-*.arrow"))
    (listed,) = (path.read_bytes() for path in cache.glob("list-*.arrow"))
    sizes = open_list(listed, where="list").column("examples")

    def signed(data: bytes) -> bytes:
        """With the hash that a manifest of these fields has, where it is one."""
        try:
            tree = json.loads(data)
            return json.dumps(tree | {"sha256": content_hash(tree)}).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return data

    def read_shard(data: bytes) -> None:
        view = open_shard(data, where="shard")
        for row in range(min(len(view), 8)):
            view.row(row)

    readers: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
        "decode": _decoding(shards),
        "manifest": (lambda data: Manifest.loads(signed(data), where="cache"), [manifest]),
        "shard": (read_shard, shards),
        "index": (lambda data: open_index(data, shard_sizes=sizes, where="index"), [index]),
        "list": (lambda data: list(open_list(data, where="list")), [listed]),
        "plan": (
            lambda data: Plan.decode(data + hashlib.sha256(data).digest(), where="plan"),
            [_plan(cache)],
        ),
        "yaml": (
            lambda data: yaml12.load(data.decode(errors="replace")),
            [(cache.parent / "recipe.yaml").read_bytes()],
        ),
    }
    reader, corpus = readers[name]

    def target(data: bytes) -> None:
        with suppress(TeachonceError, *_also_expected(name)):
            reader(data)

    return target, corpus


def _also_expected(name: str) -> tuple[type[Exception], ...]:
    """What the caller of a parser of YAML turns into an error of ours."""
    import yaml

    return (yaml.YAMLError, ValueError) if name == "yaml" else ()


def _decoding(shards: list[bytes]) -> tuple[Callable[[bytes], object], list[bytes]]:
    """The first byte chooses the policy, the second the number of positions."""
    from shared import codec
    from shared.cache.shard import open_shard
    from shared.recipes.policies import Random, Threshold, TopK, TopP

    policies = (Threshold(tau=1 / 512), Threshold(tau=1e-6), Random(draws=50), TopK(k=8), TopP(p=0.9))
    temperatures = ((1.0,), (1.0, 2.0))
    views = [open_shard(data, where="shard") for data in shards]
    sound = [
        bytes([0, view.num_positions[row] % 256]) + view.payload(row)
        for view in views
        for row in range(len(view))
    ]

    def decode(data: bytes) -> None:
        if len(data) < 2:
            return
        codec.decode(
            [data[2:]],
            policy=policies[data[0] % len(policies)],
            temperatures=temperatures[data[0] // 128],
            vocab_size=384,
            num_positions=[data[1]],
        )

    return decode, sound


def _plan(cache: Path) -> bytes:
    import numpy as np

    from shared.cache import CacheReader
    from shared.cache.plan import Plan, make_unit

    reader = CacheReader(str(cache))
    keys = list(reader.keys())
    unit = make_unit(reader.manifest.identity.digest(), keys, np.arange(len(keys)))
    return Plan(reader.manifest.identity, (unit,)).encode().to_pybytes()[:-32]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
