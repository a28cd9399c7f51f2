"""Small runs of stage two for tests: recipes, ranks as forked processes, and what a run wrote."""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from rendezvous import Rendezvous

from shared.cache import CacheReader
from shared.errors import TrainingError
from shared.recipes import Recipe, dump_recipe
from shared.recipes.files import validate_tree
from shared.runtime import World, distributed
from stage2_student.train import train

FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")
RANKS_TIMEOUT_S = 240
MEETING_S = 90
MET = b"met"
STDERR = 2


def make_recipe(tree: dict[str, Any], **overrides: Any) -> Recipe:
    """``loss__chunk_size=3`` sets ``loss.chunk_size``; blocks are sharded one by one, as large ones are."""
    merged = {section: dict(values) for section, values in tree.items() if values is not None}
    merged["parallel"] = {"min_block_params": 0} | merged.get("parallel", {})
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        merged.setdefault(section, {})[name] = value
    return validate_tree(Recipe, merged, origin="recipe test")


def teacher_of(cache: Path) -> dict[str, Any]:
    """The teacher section of a recipe that may train on this cache."""
    return {"model": CacheReader(str(cache)).manifest.identity.teacher.name}


def run_alone(recipe: Recipe, *, resume: bool = False) -> int:
    with distributed(device="cpu") as world:
        return train(recipe, world, resume=resume)


def run_ranks(recipe: Recipe, num_ranks: int, *, resume: bool = False) -> list[int]:
    return on_ranks(num_ranks, lambda world: train(recipe, world, resume=resume))


def on_ranks(
    num_ranks: int,
    function: Callable[[World], Any],
    *,
    errors: bool = False,
    new: bool = False,
    **options: Any,
) -> list[Any]:
    """What ``function(world)`` returns on each of that many gloo ranks; an error is raised here.

    Of several errors it is the first that does not only say that another rank has ended.

    errors   are values like others
    new      the ranks are new processes, not forks: they hold no memory of this one.  ``function`` is pickled
    options  of ``distributed``
    """
    gc.collect()  # a process group of this process, collected in a rank, would wait for threads that are not there
    ranks = _started(num_ranks, function, options, new=new)
    if not _have_met(ranks):  # once in thousands of starts, all of them in Gloo's own constructor
        warnings.warn(
            f"{num_ranks} ranks have not met within {MEETING_S} s and are started again", stacklevel=2
        )
        for _, process in ranks.pairs:
            process.kill()
        ranks = _started(num_ranks, function, options, new=new)
    results = [_receive(pipe, process) for pipe, process in ranks.pairs]
    for _, process in ranks.pairs:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not errors:
        raise min(failed, key=_is_of_a_peer)
    return results


def _is_of_a_peer(error: BaseException) -> bool:
    """A rank may end so early that another one has not yet joined it."""
    return isinstance(error, TrainingError) and str(error).startswith("another process of this job")


@dataclass(frozen=True)
class _Ranks:
    rendezvous: Rendezvous  # which lives as long as they do
    pairs: list[tuple[Any, Any]]  # of a pipe and a process


def _started(
    num_ranks: int, function: Callable[[World], Any], options: dict[str, Any], *, new: bool
) -> _Ranks:
    start = SPAWN if new else FORK
    ranks = _Ranks(Rendezvous(), [])
    for rank in range(num_ranks):
        receiver, sender = start.Pipe(duplex=False)
        environment = ranks.rendezvous.environment(rank, num_ranks)
        process = start.Process(target=_rank, args=(rank, environment, function, sender, options))
        process.start()
        sender.close()
        ranks.pairs.append((receiver, process))
    return ranks


def _have_met(ranks: _Ranks) -> bool:
    """Whether each has something to tell: that it has met the others, or its error."""
    deadline = time.monotonic() + MEETING_S
    return all(pipe.poll(max(0.0, deadline - time.monotonic())) for pipe, _ in ranks.pairs)


def step_records(recipe: Recipe) -> list[dict[str, Any]]:
    """The steps that a run has logged, without what depends on the clock."""
    return [_timeless(record) for record in records(recipe) if record["event"] == "step"]


def validation_records(recipe: Recipe) -> list[dict[str, Any]]:
    return [_timeless(record) for record in records(recipe) if record["event"] == "validation"]


def records(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (recipe.run.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def written_run(recipe: Recipe, *, num_ranks: int = 1) -> Path:
    """A run that has logged two steps of three in an epoch, without having trained."""
    path = recipe.run.path
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(dump_recipe(recipe)))
    (path / "environment.json").write_text(json.dumps({"num_ranks": num_ranks}))
    step = {
        "event": "step",
        "epoch": 0,
        "num_positions": 40,
        "step_s": 1.0,
        "data_wait": 0.2,
        "peak_memory_gib": 0.5,
    }
    lines = [step | {"step": number, "num_epochs": number / 3} for number in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def relog(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes each record of a run's log in place."""
    log = path / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        change(record)
    log.write_text("".join(json.dumps(record) + "\n" for record in records))


def state_of(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name: weights and moments."""
    path = recipe.run.path / "checkpoints" / f"step-{step:06d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def start(recipe: Recipe, *, resume: bool) -> Any:
    """A run in a process of its own, to be killed; it ends with the run's status."""
    process = FORK.Process(target=_alone, args=(recipe, resume))
    process.start()
    return process


def _alone(recipe: Recipe, resume: bool) -> None:
    os._exit(run_alone(recipe, resume=resume))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    names = (
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
    return {name: record[name] for name in names if name in record}


def _rank(
    rank: int,
    environment: dict[str, str],
    function: Callable[[World], Any],
    sender: Any,
    options: dict[str, Any],
) -> None:
    os.environ |= environment
    faulthandler.dump_traceback_later(RANKS_TIMEOUT_S - 20, file=STDERR)  # a rank that hangs tells where
    try:
        with distributed(device="cpu", **options) as world:
            sender.send_bytes(MET)
            result = function(world)
    except BaseException as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        result = error
    sender.send_bytes(
        pickle.dumps(result)
    )  # by value: ``send`` would pass tensors as handles of this process
    sender.close()
    os._exit(0)  # the parent's fixtures are not this process's to tear down


def _receive(pipe: Any, process: Any) -> Any:
    if not pipe.poll(RANKS_TIMEOUT_S):
        process.kill()
        return TimeoutError(f"a rank did not end within {RANKS_TIMEOUT_S} s")
    try:
        told = pipe.recv_bytes()
        return _receive(pipe, process) if told == MET else pickle.loads(told)
    except EOFError:
        process.join()
        return RuntimeError(f"a rank ended with status {process.exitcode} without a result")
