"""A run's folder, and whether a run may begin or go on in it.

recipe.yaml         as resolved
environment.json    versions, commit, machine
metrics.jsonl       a line for each step and each validation
hashes.json         of the files above, but for the log, and of those in model/
sources.json        names and cache it was made of, for its model card
model/              the small files of the student's original folder: configuration, tokenizer, processor
checkpoints/        whole ones only
export/             a Hugging Face folder
evaluation/         what it answered, and how good that is: SPLIT.parquet and SPLIT.json
results.json        written last: the run is finished
run.log             what libraries said meanwhile: warnings, and what native code writes
train.lock          there while a process trains in the folder
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shared.cache.lock import CacheBusyError, CaptureLock
from shared.errors import CheckpointError, NotAFileError, RecipeError
from shared.library_output import keep_library_output
from shared.recipes import Recipe, Split, load_recipe, recipe_text
from shared.regular_files import read_regular
from shared.runtime import World, environment
from shared.temporaries import is_temporary
from shared.vouched import opened, vouched
from stage2_student.runs.checkpoint import Checkpoint, Checkpoints
from stage2_student.runs.files import JsonLines, are_numbers, sha256_of_file, write_json, write_text
from stage2_student.runs.identity import require_same

LOCK_NAME = "train.lock"
SHUFFLED = "shuffled-pictures-"  # begins the names of answers to them, among the evaluations
IN_STEPS = ("step_s", "data_wait", "num_positions", "peak_memory_gib")
# Groups are looked at where they are drawn.
NO_FIGURES = (
    "event",
    "digest",
    "by_row",
    "by_place",
    "by_kind",
    "by_teacher",
    "reliability",
    "teacher_reliability",
)
IN_RESULTS = (
    *("run", "step", "before", "after", "answers", "cache", "times_s"),
    *("positions_per_s", "data_wait", "export"),
)
MEND_ENVIRONMENT = "put it back, or delete it: the run is then taken to have had one rank"
MEND_LOG = "put it back, leave the run out, or delete those lines to do without them"
MEND_SCORES = "Delete it; `train-student evaluate` asks the student again"
MEND_HASHES = "put them back, or delete hashes.json to take the files as they are"
MEND_RESULTS = "where checkpoints/ has one to go on from, delete it, and --resume writes it anew"


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


class RunLock(CaptureLock):
    """One process at a time in a run's folder, for the reasons of one capture at a time in a cache's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / LOCK_NAME


class RunFolder:
    """Paths of a run, and its log."""

    def __init__(self, path: Path, *, keep_checkpoints: int = 2, async_checkpoints: bool = True) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.results = path / "results.json"
        self.hashes = path / "hashes.json"
        self.model_files = path / "model"
        self.export = path / "export"
        self.evaluation = path / "evaluation"
        self.log = path / "run.log"
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.checkpoints = Checkpoints(
            path / "checkpoints", keep=keep_checkpoints, in_background=async_checkpoints
        )

    def as_it_began(self, recipe: Recipe) -> Recipe:
        """A run goes on with the day of its prompts, and with the window of its order, that it began with."""
        if not self.recipe.exists():
            return recipe
        return recipe.as_it_began(load_recipe(self.recipe))

    @contextmanager
    def taken(self, world: World, *, resume: bool) -> Iterator[None]:
        """Nobody else trains in the folder meanwhile; called by all ranks, the first one holds the lock for all.

        Raises   RecipeError  on all ranks, when another process trains in it, or there is a run in it and
                              nobody asked to go on with it
        """
        lock = RunLock(self.path)
        try:
            world.by_main(lambda: self._take(lock, resume=resume))
            yield
        finally:
            lock.close()
            if world.is_main:
                with suppress(OSError):  # a run that could not begin leaves no empty folder
                    self.path.rmdir()

    def _take(self, lock: RunLock, *, resume: bool) -> None:
        self._acquire(lock)
        self._refuse_existing(resume=resume)

    def _acquire(self, lock: RunLock) -> None:
        try:
            lock.acquire()
        except CacheBusyError as error:
            raise RecipeError(
                f"{self.path}: another process is training in this folder ({error.owner}). Wait until it has "
                "ended, or stop it; or choose another run.name"
            ) from error
        except OSError as error:
            remedy = "Mend that, and --resume goes on" if self.recipe.exists() else "Choose another run.root"
            raise RecipeError(
                f"{self.path}: the run's folder cannot be written ({error}). {remedy}"
            ) from error

    def _refuse_existing(self, *, resume: bool) -> None:
        """Raises RecipeError when the folder has a run in it and nobody asked to go on with it."""
        if not resume and any(path.name != LOCK_NAME for path in self.path.iterdir()):
            raise RecipeError(
                f"{self.path}: there is a run of this name already. Add --resume to go on with it, or choose "
                "another run.name"
            )

    def newest(
        self, identity: dict[str, Any], *, accept_data_change: bool = False, settings: Sequence[str] = ()
    ) -> Checkpoint | None:
        """The checkpoint to go on from, if any; changes nothing.

        settings  of the rows that differ from the run's
        Raises   CheckpointError  when the run in the folder is another one
        """
        latest = self.checkpoints.latest()
        if latest is not None:
            require_same(
                latest.facts.identity,
                identity,
                where=f"run {self.path}",
                accept_data_change=accept_data_change,
                settings=settings,
            )
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
            self.results.unlink(missing_ok=True)  # of fewer steps: while there are results, a run is finished
            self.hashes.unlink(missing_ok=True)  # of files that are written anew
            write_text(self.recipe, recipe_text(recipe))
            write_json(self.path / "environment.json", vouched(self._environment(world)))
            self.checkpoints.mend()
            done = latest.facts.step if latest else -1  # no checkpoint: not even the first validation counts
            self._mend_log(done)
        world.barrier()
        keep_library_output(self.log)

    def _mend_log(self, done: int) -> None:
        """Keeps the records up to that step, and says what is not there of them."""
        damaged = self.metrics.damaged()
        self.metrics.keep(lambda record: _is_record(record) and record["step"] <= done)
        missing = max(done, 0) - len(self.read_metrics().steps)
        if damaged or missing > 0:
            tqdm.write(
                f"note: {self.metrics.path}: {len(damaged)} damaged line(s) are left out, records of "
                f"{max(missing, 0)} step(s) are missing; the run's curves and times will lack them, and its table "
                "what they say of the student before training"
            )

    def write_hashes(self) -> None:
        """Vouches for what the run has written of itself before its first step."""
        names = [self.recipe, self.path / "environment.json", self.path / "sources.json"]
        whole = [path for path in self.model_files.iterdir() if not is_temporary(path.name)]
        files = [path for path in (*names, *sorted(whole)) if path.is_file()]
        told = {str(path.relative_to(self.path)): sha256_of_file(path) for path in files}
        write_json(self.hashes, vouched({"sha256": told}))

    def require_as_written(self) -> None:
        """Raises   CheckpointError  when recipe, environment, sources or the model's small files have changed"""
        found = _read_object(self.hashes, advice=MEND_HASHES)
        if found is None:  # of an earlier release, or while a run begins
            return
        told = found.get("sha256")
        if not isinstance(told, dict):
            raise CheckpointError(f"{self.hashes}: it lists no files; {MEND_HASHES}")
        changed = [name for name, sha256 in told.items() if not self._is(name, sha256)]
        # Where the hashes are others by now, the run goes on at this moment.
        if changed and _read_object(self.hashes, advice=MEND_HASHES) == found:
            raise CheckpointError(
                f"run {self.path}: {', '.join(sorted(changed)[:5])} changed, or went, after the run wrote them; "
                f"{MEND_HASHES}"
            )

    def _is(self, name: str, sha256: Any) -> bool:
        path = self.path / name
        inside = self.path.resolve() in path.resolve().parents
        try:
            return inside and sha256_of_file(path) == sha256
        except FileNotFoundError:
            return False

    def _environment(self, world: World) -> dict[str, Any]:
        """As it is now, and when the run began, which going on with it does not change."""
        began = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError, ValueError, KeyError, TypeError):
            began = str(json.loads(read_regular(self.path / "environment.json"))["began"])
        return environment() | {"num_ranks": world.size, "began": began}

    def predictions(self, split: Split) -> Path:
        return self.evaluation / f"{split}.parquet"

    def read_metrics(self) -> Metrics:
        """Raises   CheckpointError  when lines of the log are damaged"""
        damaged = self.metrics.damaged()
        if damaged:
            lines = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            raise CheckpointError(f"{self.metrics.path}: damaged in line {lines}; {MEND_LOG}")
        return Metrics(tuple(record for record in self.metrics.read() if _is_record(record)))

    def num_ranks(self) -> int:
        """As the run was last begun or resumed; one where it does not say.

        Raises   CheckpointError  when the file is damaged
        """
        path = self.path / "environment.json"
        found = _read_object(path, advice=MEND_ENVIRONMENT)
        if found is None:
            return 1
        if type(found.get("num_ranks")) is not int:
            raise CheckpointError(f"{path}: num_ranks is no number; {MEND_ENVIRONMENT}")
        return int(found["num_ranks"])

    def read_results(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is not finished.

        Raises   CheckpointError  when the file is damaged
        """
        found = _read_object(self.results, advice=MEND_RESULTS)
        if found is None:
            return None
        missing = [name for name in IN_RESULTS if name not in found]
        if missing or type(found["step"]) is not int:
            raise CheckpointError(
                f"{self.results}: {missing[0] if missing else 'step'} is missing or damaged; {MEND_RESULTS}"
            )
        return found


def is_evaluation_of_a_run(folder: Path) -> bool:
    """Whether a run keeps what its student answered in this folder."""
    place = folder.absolute().resolve()
    return place.name == "evaluation" and (place.parent / "recipe.yaml").exists()


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the log is one of ours: a step, and of training and validation numbers alone."""
    if type(record.get("step")) is not int or not isinstance(record.get("event"), str):
        return False
    if record["event"] not in ("step", "validation"):
        return True
    figures = [value for name, value in record.items() if name not in NO_FIGURES]
    if not all(value is None or isinstance(value, int | float) for value in figures):
        return False
    return record["event"] != "step" or are_numbers(record, *IN_STEPS)


def _read_object(path: Path, *, advice: str) -> dict[str, Any] | None:
    """None where there is no such file; a run that goes on may remove it at any moment.

    Raises   CheckpointError  when it is damaged
    """
    try:
        return opened(json.loads(read_regular(path)))
    except FileNotFoundError:
        return None
    except NotAFileError as error:
        raise CheckpointError(f"{error}; {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); {advice}") from error


def scores_in(path: Path) -> list[dict[str, Any]]:
    """What an evaluation came to, an object for each model; empty where there is no such file.

    Raises   CheckpointError  when it is damaged
    """
    try:
        read = json.loads(read_regular(path))
        if not isinstance(read, list) or not read:
            raise ValueError("it holds no list of models")
        models = [opened(one) for one in read]
        for one in models:
            if not isinstance(one.get("model"), str) or type(one.get("num_examples")) is not int:
                raise ValueError("a model or its number of questions is missing")
    except FileNotFoundError:
        return []
    except NotAFileError as error:
        raise CheckpointError(f"{error}. {MEND_SCORES}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). {MEND_SCORES}") from error
    return models
