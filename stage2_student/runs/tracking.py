"""The run's metrics in TensorBoard and Weights & Biases, beside ``metrics.jsonl``, which stays the record.

    with open_trackers(recipe, run_folder, world, step=-1) as trackers:     # on every rank; the first one writes
        trackers.log({"event": "step", "step": 1, "loss": 2.3, ...})

A tracker that fails is reported once and left out from then on: a service that is down must not end a
training run.  Going on from a checkpoint, no step is shown twice.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from shared.errors import RecipeError
from shared.recipes import Recipe, RunConfig, dump_recipe
from shared.runtime import World
from stage2_student.runs.files import write_text


class Tracker(Protocol):
    """Where numbers of a step go; both methods may raise anything."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run that still work, by name."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """A record of ``metrics.jsonl``: its numbers, each under its event's name."""
        numbers = {
            f"{record['event']}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers, record["step"])
            except Exception as error:
                self._leave_out(name, error)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._leave_out(name, error)
        self._trackers.clear()

    def _leave_out(self, name: str, error: Exception) -> None:
        del self._trackers[name]
        tqdm.write(
            f"note: tracker {name} failed and is left out from here on ({type(error).__name__}: {error}); "
            "metrics.jsonl has everything"
        )


class TensorBoard:
    """Event files in the run's folder ``tensorboard``."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote of later steps is no longer shown.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # steps take seconds, and a killed run should have shown what it did

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose own environment variables (WANDB_MODE, WANDB_PROJECT) hold.

    Its id lies in the run's folder, so a resumed run goes on in the same charts; steps that are done again
    are dropped by the service, which takes each step once.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "teachonce"),
            name=recipe.run.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dump_recipe(recipe),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def require_trackers(config: RunConfig) -> None:
    """Raises RecipeError when the package of a tracker is not installed."""
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"run.trackers: {', '.join(missing)} is not installed. Run `pip install 'teachonce[tracking]'`, or "
            "leave it out; metrics.jsonl is written in any case"
        )


@contextmanager
def open_trackers(recipe: Recipe, folder: Path, world: World, *, step: int) -> Iterator[Trackers]:
    """The recipe's trackers, on the first rank; none on the others.

    step  that the run goes on from; -1 for a new one
    """
    trackers: dict[str, Tracker] = {}
    for name in recipe.run.trackers if world.is_main else ():
        try:
            trackers[name] = (
                TensorBoard(folder, step=step) if name == "tensorboard" else WandB(recipe, folder)
            )
        except Exception as error:
            tqdm.write(f"note: tracker {name} cannot be opened and is left out ({error})")
    opened = Trackers(trackers)
    try:
        yield opened
    finally:
        opened.close()
