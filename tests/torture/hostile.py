"""Files of a stranger, who writes their hashes too: refused in bounded time and memory, and nothing of them runs.

What such a file says may be anything, so a command may also take it for what it says; it must not crash, hang or end
in a traceback.  Commands have three more GiB of memory than they start with.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from shared.cache import CacheReader
from shared.cache.verify import verify
from shared.errors import TeachonceError
from tests.torture.cases import Outcome, Result
from tests.torture.commands import clear_left_behind, limit_memory, run, spawn
from tests.torture.judging import judge
from tests.torture.materials import RUN, Materials
from tests.torture.mutations import OTHERS, flip, forge, forge_shard, mutate, with_digest

MORE_MEMORY_BYTES = 3 << 30
LIMIT_S = 60.0
BATCH = 25  # of mutations that are tried in one process
OF_A_CACHE = ("verify", "inspect", "train", "merge", "export", "capture", "check")


def hostile_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    case = (_cache_batch, _cache_by_a_command, _run_by_a_command, _recipe, _run_by_a_command)[number % 5]
    result = case(things, chance, folder)
    left = clear_left_behind()
    return Result(Outcome.HUNG, f"{result.what}: processes left") if left else result


# Caches.


def _spoil_cache(cache: Path, chance: random.Random) -> str:
    """A manifest of another content, or a shard of one."""
    if chance.random() < 0.6:
        forge(cache, lambda tree: mutate(tree, chance))
        return "a forged manifest"
    shard = sorted((cache / "shards").iterdir())[0]
    forge_shard(cache, flip(shard.read_bytes(), chance))
    return "a forged shard"


def _cache_batch(things: Materials, chance: random.Random, folder: Path) -> Result:
    """Many caches, read and verified by the library in one process."""
    cache = folder / "cache"
    shutil.copytree(things.cache, cache)
    sound = (cache / "manifest.json").read_bytes()
    keys = list(CacheReader(str(cache)).keys())

    def work() -> int:
        limit_memory(MORE_MEMORY_BYTES)
        for _ in range(BATCH):
            (cache / "manifest.json").write_bytes(sound)
            _spoil_cache(cache, chance)
            for action in (lambda: CacheReader(str(cache)).read(keys), lambda: verify(str(cache))):
                try:
                    action()
                except TeachonceError:
                    continue
        return 0

    ended = spawn(work).end_within(LIMIT_S)
    what = f"{BATCH} forged caches"
    if ended.status is None:
        return Result(Outcome.HUNG, what, ended.said)
    return Result(Outcome.REFUSED if ended.status == 0 else Outcome.WRONG, what, ended.said, cases=BATCH)


def _cache_by_a_command(things: Materials, chance: random.Random, folder: Path) -> Result:
    cache = folder / "cache"
    shutil.copytree(things.cache, cache)
    what = _spoil_cache(cache, chance)
    command = chance.choice(OF_A_CACHE)
    lines: dict[str, tuple[str, list[str]]] = {
        "verify": ("teacher-cache", ["verify", str(cache)]),
        "inspect": ("teacher-cache", ["inspect", str(cache)]),
        "merge": ("teacher-cache", ["merge", str(cache), str(folder / "out")]),
        "export": ("teacher-cache", ["export", str(cache), str(folder / "out")]),
        "capture": ("teacher-cache", ["capture", *things.arguments(cache=cache)]),
        "check": ("teacher-cache", ["check", *things.arguments(cache=cache)]),
        "train": ("train-student", ["run", *things.arguments(cache=cache, runs=folder / "runs")]),
    }
    return _under_limits(*lines[command], what)


# Runs.


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def _json_of_a_run(path: Path, chance: random.Random) -> str:
    tree = json.loads(path.read_text())
    tree = mutate(tree, chance) if chance.random() < 0.9 else chance.choice(OTHERS)
    path.write_text(json.dumps(with_digest(tree, name="digest")))
    return f"a forged {path.name}"


def _line_of_a_log(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines()
    place = chance.randrange(len(lines))
    record = json.loads(lines[place])
    lines[place] = json.dumps(with_digest(mutate(record, chance), name="digest"))
    path.write_text("".join(line + "\n" for line in lines))
    return f"a forged line of {path.name}"


def _checkpoint(run_folder: Path, chance: random.Random, mark: Path) -> str:
    """Bytes of a checkpoint, or a pickle that runs something; its facts vouch for it."""
    newest = run_folder / "checkpoints" / "step-000006"
    if chance.random() < 0.3:
        path, data = newest / ".metadata", pickle.dumps(Payload(mark))
    else:
        path = chance.choice([newest / ".metadata", newest / "__0_0.distcp"])
        data = flip(path.read_bytes(), chance)
    path.write_bytes(data)
    facts = json.loads((newest / "facts.json").read_text())
    facts["sha256"][path.name] = hashlib.sha256(data).hexdigest()
    (newest / "facts.json").write_text(json.dumps(with_digest(facts, name="digest")))
    return f"a forged {path.name}"


def _spoil_run(folder: Path, chance: random.Random, mark: Path) -> str:
    jsons = [
        *("results.json", "environment.json", "sources.json", "checkpoints/step-000006/facts.json"),
        *("evaluation/validation.json", "export/teachonce.json", "export/config.json", "model/config.json"),
        *("model/tokenizer_config.json", "export/preprocessor_config.json", "model/generation_config.json"),
        "export/tokenizer_config.json",
    ]
    kind = chance.random()
    if kind < 0.2:
        return _line_of_a_log(folder / "metrics.jsonl", chance)
    if kind < 0.45:
        return _checkpoint(folder, chance, mark)
    if kind < 0.6:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(mutate(yaml.safe_load(path.read_text()), chance)))
        return "a forged recipe"
    return _json_of_a_run(folder / chance.choice(jsons), chance)


def _run_by_a_command(things: Materials, chance: random.Random, folder: Path) -> Result:
    copy, mark = folder / "runs" / RUN, folder / "mark"
    shutil.copytree(things.finished_run(1), copy)
    what = _spoil_run(copy, chance, mark)
    (copy / "hashes.json").unlink(missing_ok=True)  # a stranger leaves it out
    run_arguments = things.arguments(cache=things.cache, runs=folder / "runs")
    if (resume := chance.random() < 0.5) and "results" not in what:
        (copy / "results.json").unlink()
    lines = [
        ["compare", str(copy), "--json", str(folder / "compared.json")],
        ["report", str(copy), str(folder / "page.html")],
        ["export", str(copy), "--out", str(folder / "out")],
        ["evaluate", str(copy), "--no-references"],
        ["run", *run_arguments, *(["--resume"] if resume else [])],
        ["push", str(copy), "somebody/model", "--dry-run"],
    ]
    result = _under_limits("train-student", chance.choice(lines), what)
    return Result(Outcome.WRONG, f"{what}: code of it has run", result.said) if mark.exists() else result


def _recipe(things: Materials, chance: random.Random, folder: Path) -> Result:
    """A recipe of another content, or of broken YAML."""
    recipe = folder / "recipe.yaml"
    text = things.recipe.read_text()
    if chance.random() < 0.6:
        text = yaml.safe_dump(mutate(yaml.safe_load(text), chance))
    else:
        text = flip(text.encode(), chance, most=6).decode(errors="surrogateescape")
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    program = chance.choice(["teacher-cache", "train-student"])
    arguments = [chance.choice(["check", "recipe"]), str(recipe), f"--set=run.root={folder}"]
    return _under_limits(program, arguments, "a forged recipe")


def _under_limits(program: str, arguments: list[str], what: str) -> Result:
    ended = run(program, arguments, before=lambda: limit_memory(MORE_MEMORY_BYTES), limit_s=LIMIT_S)
    return judge(ended, f"{what}; {program} {arguments[0]}", is_right=lambda: None)
