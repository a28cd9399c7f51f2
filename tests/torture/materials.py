"""What the cases use: small real models, data, a cache and a finished run, made once by the commands themselves.

things = Materials.make(Path("/tmp/torture/materials"))
things.arguments(cache=folder / "cache", runs=folder / "runs")       # of a command, after its name
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from shared.small_models import make_small_model, train_tokenizer
from tests.samples import ANSWERS, QUESTIONS, write_vqa_folder
from tests.torture.commands import Running, run, run_ranks, spawn

NUM_STEPS = 6
RUN = "tortured"
# Of metrics: what does not depend on the clock.
LOGGED = (
    "event",
    "step",
    "epoch",
    "loss",
    "ce_loss",
    "kd_loss",
    "num_positions",
    "grad_norm",
    "learning_rate",
)
PLACES = ("folder", "path", "export", "digest")  # names of what copies of a run say otherwise
# Files of a cache that people read and no program.
FOR_PEOPLE = ("log.jsonl", "capture.log", "capture.lock")


@dataclass(frozen=True)
class Materials:
    """Everything is in one folder; nothing in it is changed after it was made."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Materials:
        """Makes what is not there; some ten seconds."""
        things = cls(folder)
        if (folder / "complete").exists():
            return things
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _expect(spawn(things._make_models))
        _must("teacher-cache", ["capture", *things.arguments(cache=things.cache)])
        _must("train-student", ["run", *things.arguments(cache=things.cache, runs=things.runs)])
        _must("train-student", ["evaluate", str(things.runs / RUN), "--no-references"])
        two_ranks = ["run", *things.arguments(cache=things.cache, runs=folder / "runs-2")]
        for ended in run_ranks("train-student", two_ranks, 2):
            if ended.status != 0:
                raise RuntimeError(f"train-student on 2 ranks: status {ended.status}\n{ended.said}")
        (folder / "complete").touch()
        return things

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def finished_run(self, num_ranks: int) -> Path:
        return (self.runs if num_ranks == 1 else self.folder / f"runs-{num_ranks}") / RUN

    def arguments(self, *, cache: Path | str, runs: Path | None = None, **changes: Any) -> list[str]:
        """``run__num_workers=1`` sets ``run.num_workers``."""
        settings = {"cache.path": cache, "run.root": runs or self.folder / "runs"}
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        return [
            str(self.recipe),
            *(f"--set={name}={json.dumps(value, default=str)}" for name, value in settings.items()),
        ]

    def _make_models(self) -> int:
        texts = [*QUESTIONS, *ANSWERS] * 4
        tokenizer = train_tokenizer(texts, self.folder / "tokenizer", vocab_size=384)
        for name, width, layers, seed in (("student", 32, 1, 1), ("teacher", 64, 2, 2)):
            make_small_model(
                self.folder / name,
                tokenizer=tokenizer,
                hidden_size=width,
                num_layers=layers,
                vision_hidden_size=32,
                vision_depth=1,
                seed=seed,
            )
        write_vqa_folder(self.folder / "data", num_train=12, num_validation=4)
        self.recipe.write_text(yaml.safe_dump(self._tree()))
        return 0

    def _tree(self) -> dict[str, Any]:
        return {
            "data": {"source": str(self.folder / "data"), "max_answer_tokens": 32},
            "teacher": {"model": str(self.folder / "teacher"), "dtype": "float32"},
            "cache": {
                "path": str(self.cache),
                "num_workers": 0,
                "examples_per_shard": 3,
                "claim_timeout_s": 5,  # what a crash leaves is waited for as long
            },
            "student": {"model": str(self.folder / "student"), "compute_dtype": "float32"},
            "optimization": {
                "global_batch_size": 4,
                "microbatch_size": 2,
                "max_steps": NUM_STEPS,
                "learning_rate": 1e-2,
            },
            "evaluation": {"max_examples": 2, "max_new_tokens": 8},
            "run": {
                "name": RUN,
                "root": str(self.runs),
                "num_workers": 0,
                "checkpoint_every": 2,
                "validate_every": 3,
                "keep_checkpoints": 2,
            },
            "parallel": {"collective_timeout_s": 15},
        }

    @cached_property
    def whole_cache(self) -> dict[str, bytes]:
        return cache_files(self.cache)

    @cached_property
    def whole_runs(self) -> dict[int, dict[str, Any]]:
        """By number of ranks."""
        return {num_ranks: run_content(self.finished_run(num_ranks)) for num_ranks in (1, 2)}


def cache_files(folder: Path) -> dict[str, bytes]:
    """Every file of a cache that a program reads."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in FOR_PEOPLE
    }


def run_content(folder: Path) -> dict[str, Any]:
    """What a finished run came to: its log, the weights of its export, the scores of its answers."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {
        "log": [{name: record[name] for name in LOGGED if name in record} for record in records],
        "weights": weights_of(folder / "export"),
        "results": {name: without_places(results[name]) for name in ("step", "before", "after", "answers")},
    }


def evaluation_of(folder: Path) -> dict[str, Any]:
    """Scores and predictions of a run, by file."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "evaluation").iterdir()):
        is_scores = path.suffix == ".json"
        found[path.name] = without_places(json.loads(path.read_text())) if is_scores else path.read_bytes()
    return found


def without_places(value: Any) -> Any:
    """A JSON tree without the folders in which copies of a run differ."""
    if isinstance(value, dict):
        return {name: without_places(inner) for name, inner in value.items() if name not in PLACES}
    return [without_places(inner) for inner in value] if isinstance(value, list) else value


def weights_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                found[name] = file.get_tensor(name).numpy().tobytes()
    return found


def difference(found: dict[str, Any], wanted: dict[str, Any], *, what: str) -> str | None:
    """Names what differs; None where nothing does."""
    names = _differing(found, wanted)
    return f"{what} differs in {', '.join(names[:4])}" if names else None


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = []
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names += [f"{name}{inner}" for inner in _differing(one, other)]
        elif one != other and repr(one) != repr(other):  # NaN is not itself
            names.append(name)
    return names


def _must(program: str, arguments: Sequence[str]) -> None:
    ended = run(program, arguments, limit_s=300)
    if ended.status != 0:
        raise RuntimeError(f"{program} {arguments[0]}: status {ended.status}\n{ended.said}")


def _expect(running: Running) -> None:
    ended = running.end(deadline_s=float("inf"))
    if ended.status != 0:
        raise RuntimeError(f"status {ended.status}\n{ended.said}")
