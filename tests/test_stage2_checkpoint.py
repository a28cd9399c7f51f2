"""Checkpoints are whole or absent, and the newest and the best ones stay."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import on_ranks
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import stage2_student.runs.checkpoint as checkpoint_module
from shared.errors import CheckpointError, TrainingError
from shared.recipes import OptimizationConfig
from shared.runtime import World, distributed
from shared.temporaries import temporary_name
from stage2_student.runs.checkpoint import (
    Checkpoint,
    Checkpoints,
    Facts,
    load,
    set_num_updates,
    student_state,
)
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.export import choose_checkpoint
from stage2_student.training.optim import make_optimizer


def facts(step: int, loss: float | None = None) -> Facts:
    return Facts(step=step, num_updates=step, num_ranks=1, identity={"a": 1}, validation_loss=loss)


def save(folder: Checkpoints, *taken: Facts, state: dict[str, Any] | None = None) -> None:
    with distributed(device="cpu") as world:
        for one in taken:
            folder.save(state or {"model": {"w": torch.full((3,), float(one.step))}}, one, world)
        folder.wait()


def steps(folder: Checkpoints) -> list[int]:
    return [found.facts.step for found in folder.all()]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints", keep=2)
    save(folder, facts(1, 3.0), facts(2, 1.0), facts(3), facts(4, 2.0), facts(5))
    assert steps(folder) == [2, 4, 5]
    best, latest = folder.best(), folder.latest()
    assert best is not None
    assert latest is not None
    assert (best.facts.step, latest.facts.step) == (2, 5)


def test_without_validation_none_is_the_best(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folder = Checkpoints(run.checkpoints.folder, keep=1)
    save(folder, facts(1), facts(2, float("nan")), facts(3))
    assert steps(folder) == [3]
    assert choose_checkpoint(run).facts.step == 3
    with pytest.raises(CheckpointError, match=r"none of its checkpoints was validated"):
        choose_checkpoint(run, best=True)


def test_latest_and_best_name_whole_checkpoints(tmp_path: Path) -> None:
    def named() -> dict[str, str]:
        files = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_file())
        named = {path.name: path.read_text().strip() for path in files}
        return {name: to for name, to in named.items() if (tmp_path / "checkpoints" / to).is_dir()}

    folder = Checkpoints(tmp_path / "checkpoints", keep=1)
    save(folder, facts(1))
    assert named() == {"latest": "step-000001"}
    save(folder, facts(2, 1.0), facts(3, 2.0))
    assert named() == {"latest": "step-000003", "best": "step-000002"}
    (tmp_path / "checkpoints" / "latest").unlink()  # killed before it was written
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    folder.mend()
    assert named() == {"latest": "step-000003", "best": "step-000003"}


def test_one_that_the_run_removes_while_it_is_looked_at_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export, or a comparison, of a run that goes on."""
    folder = Checkpoints(tmp_path)
    save(folder, facts(1), facts(2))
    read, first = checkpoint_module._read_facts, folder.at(1)

    def removed_before(path: Path) -> Facts:
        if path == first.path and path.exists():
            checkpoint_module._remove(path)
        return read(path)

    monkeypatch.setattr(checkpoint_module, "_read_facts", removed_before)
    assert steps(folder) == [2]
    with pytest.raises(CheckpointError, match=r"step-000001: the run goes on.* Run the same command again"):
        load(first, {"model": {"w": torch.zeros(3)}})


def test_its_own_files_alone_are_looked_at_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may write its facts anew meanwhile, with a validation that comes after it."""
    folder = Checkpoints(tmp_path)
    save(folder, facts(1))
    first, seen, sha256 = folder.at(1), [], checkpoint_module._sha256

    def looked_at(path: Path) -> str | None:
        seen.append(path.name)
        return sha256(path)

    (first.path / temporary_name("facts.json")).touch()
    monkeypatch.setattr(checkpoint_module, "_sha256", looked_at)
    load(first, {"model": {"w": torch.zeros(3)}})
    assert sorted(seen) == sorted(first.facts.sha256)


def test_one_that_another_process_reads_may_keep_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems keep a file that is open, and with it the folder."""
    rmtree = shutil.rmtree

    def kept(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        if path.name != "step-000001.partial":
            rmtree(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", kept)
    folder = Checkpoints(tmp_path, keep=1)
    save(folder, facts(1), facts(2), facts(3))
    assert steps(folder) == [3]
    monkeypatch.undo()
    folder.mend()
    assert not list(tmp_path.glob("*.partial"))


def test_steps_beyond_a_million_are_in_order(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints", keep=2)
    save(folder, facts(999_999), facts(1_000_000), facts(1_000_001))
    assert steps(folder) == [1_000_000, 1_000_001]


def test_a_step_is_saved_once_and_what_was_saved_stays(tmp_path: Path) -> None:
    """Training goes on from the newest checkpoint, so a step that has one does not come again."""
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    with pytest.raises(CheckpointError, match="step-000001: cannot be written"):
        save(folder, facts(1), state={"model": {"w": torch.zeros(3)}})
    state = {"model": {"w": torch.zeros(3)}}
    load(folder.at(1), state)
    assert state["model"]["w"].tolist() == [1.0, 1.0, 1.0]


def test_what_a_killed_process_left_is_not_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    (tmp_path / "checkpoints" / "step-000002.partial").mkdir()
    latest = folder.latest()
    assert latest is not None
    assert latest.facts.step == 1
    folder.mend()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000001", "latest"}


def test_a_write_that_fails_leaves_no_checkpoint_and_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """A full disk, as far as a process can see: the files may not grow beyond a few bytes."""

    def fill_up(world: World) -> tuple[list[int], list[str]]:
        folder = Checkpoints(tmp_path / "checkpoints")
        folder.save({"model": {"w": torch.zeros(3)}}, facts(1), world)
        folder.wait()
        world.barrier()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda _: usage._replace(free=1000)  # type: ignore[assignment]
        folder.save({"model": {"w": torch.zeros(3000)}}, facts(2), world)
        errors = []
        for wait in (folder.wait, folder.raise_failure):
            try:
                wait()
            except CheckpointError as error:
                errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return steps(folder), errors

    for whole, errors in on_ranks(2, fill_up):
        assert whole == [1]
        assert len(errors) == 1  # said once
        assert "step-000002: cannot be written: the disk is full: " in errors[0]
    assert not list(tmp_path.rglob("*.partial"))  # nothing keeps it full


def test_a_first_checkpoint_that_cannot_begin_ends_all_ranks(tmp_path: Path) -> None:
    """Where a full disk refuses its folder; the others do not wait in a collective until that times out."""
    (tmp_path / "checkpoints").touch()

    def work(world: World) -> None:
        Checkpoints(tmp_path / "checkpoints").save({"model": {"w": torch.zeros(3)}}, facts(1), world)

    ended = on_ranks(2, work, errors=True, collective_timeout_s=30.0)
    assert isinstance(ended[0], OSError)
    assert isinstance(ended[1], TrainingError)
    assert "another process of this job has ended" in str(ended[1])


def test_a_rank_that_dies_while_a_checkpoint_is_written_is_told_as_that(tmp_path: Path) -> None:
    """Not as a disk that cannot be written."""

    def work(world: World) -> None:
        if world.rank == 1:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        folder = Checkpoints(tmp_path)
        folder.save({"model": {"w": torch.zeros(3)}}, facts(1), world)
        folder.wait()

    ended = on_ranks(2, work, errors=True)
    assert isinstance(ended[0], TrainingError)
    assert "another process of this job has ended" in str(ended[0])


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What is written is the state at the time of the call."""
    state = {"model": {"w": torch.ones(1000, 100)}}
    folder = Checkpoints(tmp_path / "checkpoints")
    with distributed(device="cpu") as world:
        folder.save(state, facts(1), world)
        state["model"]["w"].fill_(7.0)
        folder.wait()
    load(folder.at(1), state)
    assert (state["model"]["w"] == 1.0).all()


def test_damage_is_said_and_not_loaded(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    found = folder.at(1)
    (data,) = found.path.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"step-000001.*Delete its folder"):
        load(found, {"model": {"w": torch.zeros(3)}})
    (found.path / "facts.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"facts\.json cannot be read"):
        folder.latest()


def files(checkpoint: Checkpoint) -> list[Path]:
    return sorted(path for path in checkpoint.path.iterdir() if path.name != "facts.json")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_any_file_is_found_before_anything_is_loaded(tmp_path: Path, place: float) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1), state={"model": {"w": torch.ones(1000)}})
    found = folder.at(1)
    assert len(files(found)) == 2  # the tensors, and where they lie
    for path in files(found):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[int(len(whole) * place)] ^= 1
        path.write_bytes(flipped)
        state = {"model": {"w": torch.zeros(1000)}}
        with pytest.raises(CheckpointError, match=rf"step-000001: {path.name} is damaged.*Delete"):
            load(found, state)
        assert not state["model"]["w"].any()
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"step-000001: {path.name} .*Delete"):
            load(found, state)
        path.write_bytes(whole)
    load(found, state)
    assert state["model"]["w"].all()


def test_all_ranks_refuse_what_the_first_one_finds_damaged(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    path = files(folder.at(1))[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    def refused(world: World) -> bool:
        with pytest.raises(CheckpointError, match="is damaged"):
            load(folder.at(1), {"model": {"w": torch.zeros(3)}}, world=world)
        return True

    assert on_ranks(2, refused) == [True, True]


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what the facts tell, as somebody who writes a digest that fits would."""
    path = checkpoint.path / "facts.json"
    told = json.loads(path.read_text())
    told.pop("digest")
    changed = change(told)
    if isinstance(changed, dict):
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        changed = changed | {"digest": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(changed))


def test_no_flipped_bit_of_the_facts_goes_unnoticed(tmp_path: Path) -> None:
    """All bits: the hashes' table, the number of updates and the validation loss decide what is loaded."""
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1, 2.5))
    path = folder.at(1).path / "facts.json"
    whole, told = path.read_bytes(), folder.at(1).facts
    accepted = 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            assert folder.at(1).facts == told  # white space for white space
            accepted += 1
    assert accepted < 8 * len(whole) // 20


class Hostile:
    """Runs something when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.proof}",))


def plant(
    checkpoint: Checkpoint, change: Callable[[Any], Any], pickled: Callable[[Any], bytes] = pickle.dumps
) -> None:
    """Rewrites the description of the tensors, with hashes that fit."""
    path = checkpoint.path / ".metadata"
    path.write_bytes(pickled(change(pickle.loads(path.read_bytes()))))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(checkpoint, lambda told: told | {"sha256": told["sha256"] | {".metadata": sha256}})


def test_a_strangers_checkpoint_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    plant(folder.at(1), lambda metadata: replace(metadata, planner_data=Hostile(proof)))
    with pytest.raises(CheckpointError, match=r"\.metadata asks for posix\.system"):
        load(folder.at(1), {"model": {"w": torch.zeros(3)}})
    assert not proof.exists()


class Attribute:
    """Unpickled by ``getattr``."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = (owner, name)

    def __reduce__(self) -> Any:
        return (getattr, self.asked)


class EarlyPickler(pickle.Pickler):
    """Writes a member of an enum as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_members_of_an_enum_are_read_as_early_releases_of_python_write_them(tmp_path: Path) -> None:
    def pickled(metadata: Any) -> bytes:
        file = io.BytesIO()
        EarlyPickler(file).dump(metadata)
        assert b"getattr" in file.getvalue()
        return file.getvalue()

    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    plant(folder.at(1), lambda metadata: metadata, pickled)
    state = {"model": {"w": torch.zeros(3)}}
    load(folder.at(1), state)
    assert state["model"]["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize(("owner", "name"), [(Path, "unlink"), (Path, "__class__"), (Metadata, "__init__")])
def test_other_attributes_are_not_looked_up(tmp_path: Path, owner: Any, name: str) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    plant(folder.at(1), lambda metadata: replace(metadata, planner_data=Attribute(owner, name)))
    with pytest.raises(CheckpointError, match=rf"asks for {name} of .*, which is no member of an enum"):
        load(folder.at(1), {"model": {"w": torch.zeros(3)}})


def test_an_entry_that_torch_would_unpickle_is_refused(tmp_path: Path) -> None:
    """torch reads an entry of bytes with weights_only=False, whatever the state asks for."""
    proof = tmp_path / "proof"
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    torch.save(Hostile(proof), tmp_path / "bytes")
    (data,) = folder.at(1).path.glob("*.distcp")
    data.write_bytes((tmp_path / "bytes").read_bytes())

    def bytes_for_a_tensor(metadata: Any) -> Any:
        (index,) = metadata.storage_data
        place = replace(metadata.storage_data[index], offset=0, length=data.stat().st_size)
        index = replace(index, offset=None, index=None)
        return replace(
            metadata,
            state_dict_metadata=dict.fromkeys(metadata.state_dict_metadata, BytesStorageMetadata()),
            storage_data={index: place},
        )

    plant(folder.at(1), bytes_for_a_tensor)
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    rewrite(folder.at(1), lambda told: told | {"sha256": told["sha256"] | {data.name: sha256}})
    with pytest.raises(CheckpointError, match=r"BytesStorageMetadata.*it was not run"):
        load(folder.at(1), {"model": {"w": torch.zeros(3)}})
    assert not proof.exists()


def test_tensors_lie_in_the_checkpoint_alone(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    plant(
        folder.at(1),
        lambda metadata: replace(
            metadata,
            storage_data={
                index: replace(place, relative_path="../../elsewhere")
                for index, place in metadata.storage_data.items()
            },
        ),
    )
    with pytest.raises(CheckpointError, match=r"points to '../../elsewhere', which is no file"):
        load(folder.at(1), {"model": {"w": torch.zeros(3)}})


@pytest.mark.parametrize(
    "change",
    [
        lambda told: [],
        lambda told: 5,
        lambda told: told | {"step": "1"},
        lambda told: told | {"step": 3},
        lambda told: told | {"step": True},
        lambda told: told | {"identity": []},
        lambda told: told | {"num_updates": None},
        lambda told: told | {"validation_loss": "low"},
        lambda told: told | {"sha256": [1]},
        lambda told: told | {"sha256": {}},
        lambda told: told | {"more": 1},
        *(
            lambda told, name=field.name: {key: told[key] for key in told if key != name}
            for field in fields(Facts)
        ),
    ],
)
def test_facts_of_another_form_are_one_error(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1))
    rewrite(folder.at(1), change)
    with pytest.raises(CheckpointError, match=r"step-000001: facts\.json cannot be read.*Delete it"):
        folder.latest()


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    save(folder, facts(1), facts(2))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 1, 2"):
        folder.at(7)


def test_model_and_optimizer_come_back_bit_for_bit_and_go_on_alike(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints")
    config = OptimizationConfig(max_steps=9, learning_rate=0.1)

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        model[0].weight.requires_grad_(False)
        return model, make_optimizer(model, config)

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            model(torch.full((2, 3), float(step + 1))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh(0)
    advance(model, optimizer, range(3))
    save(folder, facts(3), state=student_state(model, optimizer))
    advance(model, optimizer, range(3, 6))
    other, its_optimizer = fresh(1)
    load(folder.at(3), student_state(other, its_optimizer))
    set_num_updates(its_optimizer, 3)
    advance(other, its_optimizer, range(3, 6))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_two_ranks_see_one_another_s_checkpoint(tmp_path: Path) -> None:
    def work(world: World) -> list[int]:
        folder = Checkpoints(tmp_path / "checkpoints", keep=1)
        for step in (1, 2):
            folder.save({"model": {"w": torch.arange(3.0)}}, facts(step), world)
        folder.wait()
        world.barrier()
        return steps(folder)

    assert on_ranks(2, work) == [[2], [2]]
