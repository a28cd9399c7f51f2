"""A run's folder, and whether a run may begin or go on in it.

recipe.yaml         as resolved
environment.json    versions, commit, machine
metrics.jsonl       a line for each step and each validation
model/              the small files of the student's original folder: configuration, tokenizer, processor
checkpoints/        whole ones only
export/             a Hugging Face folder
evaluation/         what it answered, and how good that is: SPLIT.parquet and SPLIT.json
results.json        written last: the run is finished
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.config import Recipe, Split, dump_recipe
from shared.errors import CheckpointError, RecipeError
from shared.runtime import World, environment
from stage2_student.checkpoint import Checkpoint, Checkpoints
from stage2_student.files import JsonLines, write_json, write_text
from stage2_student.identity import require_same


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl, and what they come to.  Times are those of the first rank, which writes it."""

    records: tuple[dict[str, Any], ...]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == "step"]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == "validation"]

    @property
    def training_s(self) -> float:
        return sum(record["step_s"] for record in self.steps)

    @property
    def wait_s(self) -> float:
        """For data, of all steps."""
        return sum(record["data_wait"] * record["step_s"] for record in self.steps)

    @property
    def positions_per_s(self) -> float | None:
        """Over all steps, waits for data included; None before the first."""
        positions = sum(record["num_positions"] for record in self.steps)
        return positions / self.training_s if self.steps else None


class RunFolder:
    """Paths of a run, and its log."""

    def __init__(self, path: Path, *, keep_checkpoints: int = 2, async_checkpoints: bool = True) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.results = path / "results.json"
        self.model_files = path / "model"
        self.export = path / "export"
        self.evaluation = path / "evaluation"
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.checkpoints = Checkpoints(
            path / "checkpoints", keep=keep_checkpoints, in_background=async_checkpoints
        )

    def refuse_existing(self, *, resume: bool) -> None:
        """Raises RecipeError when the folder has a run in it and nobody asked to go on with it."""
        if self.path.exists() and any(self.path.iterdir()) and not resume:
            raise RecipeError(
                f"{self.path}: there is a run of this name already. Add --resume to go on with it, or choose "
                "another run.name"
            )

    def newest(self, identity: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint to go on from, if any; changes nothing.

        Raises   CheckpointError  when the run in the folder is another one
        """
        latest = self.checkpoints.latest()
        if latest is not None:
            require_same(latest.facts.identity, identity, where=f"run {self.path}")
        return latest

    def require_unfinished(self, results: dict[str, Any] | None, *, num_steps: int) -> None:
        """Raises   CheckpointError  when all would have to be done again, over what a finished run has logged"""
        if results is not None:
            raise CheckpointError(
                f"run {self.path}: finished after {results['step']} steps, {num_steps} are asked for, and there "
                "is no checkpoint to go on from. Put one back into checkpoints/, or choose another run.name"
            )

    def begin(self, recipe: Recipe, latest: Checkpoint | None, world: World) -> None:
        """Makes the folder ready to go on from that checkpoint; called by all ranks.

        What comes after the checkpoint is removed, so nothing may be wrong with the run any more: a finished
        one, or another one, is told apart before.
        """
        world.barrier()  # all have looked before the first rank cleans up
        if world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe, yaml.safe_dump(dump_recipe(recipe), sort_keys=False))
            write_json(self.path / "environment.json", environment() | {"num_ranks": world.size})
            self.checkpoints.mend()
            done = latest.facts.step if latest else -1  # no checkpoint: not even the first validation counts
            self.metrics.keep(lambda record: record["step"] <= done)
        world.barrier()

    def predictions(self, split: Split) -> Path:
        return self.evaluation / f"{split}.parquet"

    def read_metrics(self) -> Metrics:
        return Metrics(tuple(self.metrics.read()))

    def num_ranks(self) -> int:
        """As the run was last begun or resumed; one where it does not say."""
        path = self.path / "environment.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["num_ranks"]) if path.exists() else 1

    def read_results(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is not finished."""
        if not self.results.exists():
            return None
        try:
            return dict(json.loads(self.results.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(
                f"{self.results}: not JSON ({error}); delete it and use --resume"
            ) from error
