"""Checkpoints of a run: whole or absent.

    checkpoints = Checkpoints(run_folder / "checkpoints", keep=2)
    checkpoints.save(student_state(student, optimizer), facts, world)      # copies, and writes behind training
    checkpoints.wait()                                                      # for what is still being written
    found = checkpoints.latest()                                            # a whole one, or None

For people and scripts, the files ``latest`` and ``best`` beside the checkpoints name whole ones; nothing here
reads them.  They are not links, which do not survive every way to copy a run.

A checkpoint is written under a name that ends in ``.partial``, synced, and renamed as the last act, so a
process killed at any moment leaves nothing that looks like a checkpoint and is none.  Tensors go through
torch.distributed.checkpoint: each rank writes its shards, and any number of ranks can read them.  A thread of
each rank writes from a copy in host memory; the first rank's thread also does the renaming, which it may as
soon as its own part ends, because that part ends when those of all ranks have.

Nothing else is needed to go on: the order of examples, the learning rate and the random streams are pure
functions of the recipe and the step.

A flipped bit in a tensor is a number like any other, so a checkpoint has the SHA-256 of each of its files in
``facts.json``, taken by the first rank's thread when all are written, and compared before any is loaded.  The facts
decide too, which checkpoint is the best one for example, so their own digest stands among them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from shared.cache.storage import sync_folder
from shared.errors import CheckpointError
from shared.regular_files import read_regular
from shared.runtime import World, lost_peer
from shared.vouched import DIGEST, opened, vouched
from stage2_student.runs.checkpoint_reader import CheckpointReader
from stage2_student.runs.files import write_json, write_text

FACTS = "facts.json"
PARTIAL = ".partial"
LATEST, BEST = "latest", "best"  # files with the name of such a checkpoint
FULL_BYTES = 1 << 20  # with less than that free, a disk is full
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says about itself."""

    step: int  # steps done; the next one has this index
    num_updates: int  # of the optimizer: steps less those that were left out as not finite
    num_ranks: int
    identity: dict[str, Any]  # of recipe, cache, data and tokenizer: see ``identity.py``
    validation_loss: float | None = None  # nats a position, when this very step was validated
    sha256: dict[str, str] = field(default_factory=dict)  # in hex, of each other file


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    facts: Facts


class Checkpoints:
    """The folder of a run's checkpoints; keeps the newest ``keep`` and the best one.

    in_background  ``save`` returns when the state has been copied; False: when the checkpoint is whole
    """

    def __init__(self, folder: Path, *, keep: int = 2, in_background: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.in_background = in_background
        self._writing: Future[None] | None = None

    def all(self) -> list[Checkpoint]:
        """Whole checkpoints, oldest first; without those that a run which goes on removes meanwhile."""
        found = []
        for path in self.folder.glob("step-*"):
            if path.name.endswith(PARTIAL):
                continue
            try:
                found.append(Checkpoint(path, _read_facts(path)))
            except CheckpointError:
                if path.exists():
                    raise
        return sorted(found, key=lambda one: one.facts.step)

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.all()), None)

    def best(self) -> Checkpoint | None:
        """The one with the lowest validation loss, among those taken at a step that was validated; or None."""
        return min((found for found in self.all() if _is_validated(found)), key=_badness, default=None)

    def at(self, step: int) -> Checkpoint:
        for found in self.all():
            if found.facts.step == step:
                return found
        there = ", ".join(str(found.facts.step) for found in self.all()) or "none"
        raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; there are: {there}")

    def save(self, state: dict[str, Any], facts: Facts, world: World) -> None:
        """Called by all ranks, once a step; the state may change as soon as it returns.

        Raises   CheckpointError  when the checkpoint before this one, or this one, cannot be written
        """
        self.wait()
        partial = self._path(facts.step, PARTIAL)
        group = (
            world.background_group
        )  # before what one rank alone may fail in: the others would wait for its making
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        with quiet_dcp():
            written: Future = dcp.async_save(  # type: ignore[assignment]  # of threads, not of processes
                state,
                storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
                process_group=group,
            )
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing = thread.submit(self._finish, written, facts, is_main=world.is_main)
        thread.shutdown(wait=False)
        if not self.in_background:
            self.wait()
            world.barrier()

    def wait(self) -> None:
        """Returns when nothing is being written any more; on the first rank the checkpoint is then whole.

        Raises   CheckpointError  when it could not be written
                 TrainingError    when another rank, which was to write its part, has ended
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def raise_failure(self) -> None:
        """Raises CheckpointError when a checkpoint could not be written; does not wait for one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def note_validation(self, step: int, loss: float | None) -> None:
        """Of a whole checkpoint, whose step was validated after it was saved; called by one rank."""
        found = self.at(step)
        write_json(found.path / FACTS, vouched(asdict(replace(found.facts, validation_loss=loss))))
        self._point()

    def _finish(self, written: Future, facts: Facts, *, is_main: bool) -> None:
        """On a thread of each rank: waits until all ranks have written, then makes the folder a checkpoint."""
        partial, final = self._path(facts.step, PARTIAL), self._path(facts.step)
        try:
            written.result()
            if is_main:
                told = asdict(replace(facts, sha256=hashes(partial)))
                write_json(partial / FACTS, vouched(told))
                partial.rename(final)
                self._point()
                self._forget_old()
        except (CheckpointException, OSError, RuntimeError) as error:
            lost = lost_peer(str(error))
            if lost is not None:
                raise lost from error
            reason = str(error).strip().split("\n")[-1]
            full = "the disk is full: " if _is_full(self.folder) else ""
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)  # it would keep the disk full
            raise CheckpointError(
                f"checkpoint {final}: cannot be written: {full}{reason}. Older ones are whole; when the cause is "
                "gone, --resume goes on from the newest of them"
            ) from error

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step-{step:06d}{suffix}"

    def mend(self) -> None:
        """Clears away what a killed process left, and sets ``latest`` and ``best`` right; called by one rank."""
        for path in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(path)
        if self.folder.exists():
            self._point()

    def _point(self) -> None:
        """Writes ``latest`` and ``best``, the second only where a checkpoint was validated."""
        for name, found in ((LATEST, self.latest()), (BEST, self.best())):
            if found is None:
                (self.folder / name).unlink(missing_ok=True)
            else:
                write_text(self.folder / name, found.path.name + "\n")
        sync_folder(self.folder)

    def _forget_old(self) -> None:
        whole = self.all()
        best = self.best()
        for found in whole[: -self.keep]:
            if best is None or found.path != best.path:
                _remove(found.path)


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Without the notes that torch.distributed.checkpoint makes about its own ways."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def load(checkpoint: Checkpoint, state: dict[str, Any], *, world: World | None = None) -> None:
    """Reads into the tensors of ``state``, in place; called by all ranks of the world, or by one process alone.

    Raises   CheckpointError  on all ranks, when the files are damaged or hold other tensors.
    """
    damage = _damage(checkpoint) if world is None else world.by_main(lambda: _damage(checkpoint))
    if damage is not None:
        raise _unreadable(checkpoint, damage)
    try:
        with quiet_dcp():
            reader = CheckpointReader(checkpoint.path, files=checkpoint.facts.sha256)
            dcp.load(state, storage_reader=reader, no_dist=world is None)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[-1]
        raise _unreadable(checkpoint, f"cannot be read: {reason}") from error


def _unreadable(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    if not checkpoint.path.exists():
        return CheckpointError(
            f"checkpoint {checkpoint.path}: the run goes on, and has removed it for newer ones. Run the same command "
            "again"
        )
    return CheckpointError(
        f"checkpoint {checkpoint.path}: {reason}. Delete its folder to go on from an older one"
    )


def student_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The tensors of model and optimizer by name, as torch.distributed.checkpoint reads and writes them.

    Moments of the optimizer are made (as zeros) where it has not stepped yet, to be read into.
    """
    state: dict[str, Any] = {"model": dict(model.named_parameters()) | _persistent_buffers(model)}
    if optimizer is not None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {name: p for name, p in model.named_parameters() if id(p) in known}
        for moment in MOMENTS:
            state[moment] = {name: _slots(optimizer, p)[moment] for name, p in trained.items()}
    return state


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Gives the optimizer the number of updates that its moments have seen."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _slots(optimizer, parameter)["step"].fill_(float(num_updates))


def _slots(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    slots = optimizer.state[parameter]
    if not slots:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        slots["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
        for moment in MOMENTS:
            slots[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return slots


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict() if name in buffers}


def _is_validated(checkpoint: Checkpoint) -> bool:
    loss = checkpoint.facts.validation_loss
    return loss is not None and not math.isnan(loss)


def _badness(checkpoint: Checkpoint) -> tuple[float, int]:
    """Of one that was validated; of equal ones the newest is the best."""
    assert checkpoint.facts.validation_loss is not None
    return checkpoint.facts.validation_loss, -checkpoint.facts.step


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the facts, by path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FACTS)
    found = _hashes_of(folder, [path.relative_to(folder).as_posix() for path in paths])
    return {name: sha256 for name, sha256 in found.items() if sha256 is not None}


def _hashes_of(folder: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Of the files of these names, None of what is no file; several at once, as hashing lets threads run."""
    with ThreadPoolExecutor(max_workers=4) as threads:
        return dict(zip(names, threads.map(_sha256, [folder / name for name in names]), strict=True))


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files, if anything."""
    try:
        found = _hashes_of(checkpoint.path, list(checkpoint.facts.sha256))
    except OSError as error:
        return f"its files cannot be read ({error})"
    for name, sha256 in checkpoint.facts.sha256.items():
        if found[name] is None:
            return f"{name} is missing"
        if found[name] != sha256:
            return f"{name} is damaged: its SHA-256 is not the one it was written with"
    try:
        CheckpointReader(checkpoint.path, files=checkpoint.facts.sha256).read_metadata()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read_facts(path: Path) -> Facts:
    try:
        read = json.loads(read_regular(path / FACTS))
        if not isinstance(read, dict):
            raise ValueError(f"it holds {read!r}")
        missing = [name for name in (*(one.name for one in fields(Facts)), DIGEST) if name not in read]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        facts = Facts(**opened(read))
        _require_types(facts, folder_name=path.name)
        return facts
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {FACTS} cannot be read ({error}); the folder was changed after it was "
            "written. Delete it to go on from an older one"
        ) from error


def _require_types(facts: Facts, *, folder_name: str) -> None:
    """Raises   ValueError  for the first fact that is not of its kind, or a step that is not the folder's"""
    fits = {
        "step": type(facts.step) is int and folder_name == f"step-{facts.step:06d}",
        "num_updates": type(facts.num_updates) is int,
        "num_ranks": type(facts.num_ranks) is int,
        "identity": isinstance(facts.identity, dict),
        "validation_loss": facts.validation_loss is None or type(facts.validation_loss) in (int, float),
        "sha256": isinstance(facts.sha256, dict) and bool(facts.sha256),
    }
    for name, is_fit in fits.items():
        if not is_fit:
            raise ValueError(f"{name} is {getattr(facts, name)!r}")


def _is_full(folder: Path) -> bool:
    """What torch.distributed.checkpoint raises does not say so."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free < FULL_BYTES
    return False


def _remove(path: Path) -> None:
    """Takes the name away first, so that a kill in the middle leaves no half a checkpoint under it."""
    doomed = path.with_name(path.name + PARTIAL)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # a network file system keeps what others read
