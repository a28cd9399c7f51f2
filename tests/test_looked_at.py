"""Folders that are looked at, read or written while another process changes them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_examples import VERSIONS, capture, keys_and_rows, make_identity, make_row
from stage2_runs import make_recipe, written_run

import shared.cache.lock as lock_module
import stage2_student.runs.files as files_module
import stage2_student.runs.run_folder as run_folder_module
from shared.cache import CacheBusyError, CacheReader, CacheWriter
from shared.cache.storage import LocalFolder
from shared.cache.verified import VerifiedFiles
from shared.completeness import broken_shards
from shared.errors import CheckpointError, RecipeError
from shared.regular_files import read_regular
from shared.runtime import alone
from shared.vouched import vouched
from stage1_teacher.capturing.progress import require_space
from stage2_student.evaluation.run_records import read_run
from stage2_student.runs.checkpoint import Checkpoint, Checkpoints
from stage2_student.runs.run_folder import RunFolder, RunLock, scores_in
from stage2_student.training.export import _replace_folder

FORK = multiprocessing.get_context("fork")


# --- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "look", "expected"),
    [
        ("results.json", RunFolder.read_results, None),
        ("environment.json", RunFolder.num_ranks, 1),
        ("hashes.json", RunFolder.require_as_written, None),
        ("metrics.jsonl", lambda folder: folder.metrics.read(), []),
        ("scores.json", lambda folder: scores_in(folder.path / "scores.json"), []),
    ],
)
def test_a_file_that_a_run_which_goes_on_removes_just_now_is_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    look: Callable[[RunFolder], object],
    expected: object,
) -> None:
    (tmp_path / name).write_text(json.dumps(vouched({"num_ranks": 2, "sha256": {}})))

    def removed_before(path: Path, **options: Any) -> bytes:
        path.unlink(missing_ok=True)
        return read_regular(path, **options)

    for module in (run_folder_module, files_module):
        monkeypatch.setattr(module, "read_regular", removed_before)
    assert look(RunFolder(tmp_path)) == expected


def test_files_that_a_run_writes_anew_as_it_goes_on_have_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "recipe.yaml").write_text("as it began")
    folder.hashes.write_text(json.dumps(vouched({"sha256": {"recipe.yaml": "0" * 64}})))
    with pytest.raises(CheckpointError, match=r"recipe\.yaml changed"):
        folder.require_as_written()
    is_as_told = RunFolder._is

    def goes_on_then(self: RunFolder, name: str, sha256: str) -> bool:
        self.hashes.unlink()
        return is_as_told(self, name, sha256)

    monkeypatch.setattr(RunFolder, "_is", goes_on_then)
    folder.require_as_written()


def test_the_log_of_a_run_that_takes_a_step_meanwhile_is_not_cut(
    tmp_path: Path, distillation_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is logged before its checkpoint is written; read the other way round, the log lacked it."""
    path = written_run(make_recipe(distillation_tree, run__name="at-work", run__root=str(tmp_path)))
    facts = {"num_updates": 3, "num_ranks": 1, "identity": {}, "validation_loss": None, "sha256": {"x": "0"}}
    latest = Checkpoints.latest

    def after_another_step(self: Checkpoints) -> Checkpoint | None:
        log = RunFolder(path).metrics
        log.append(log.read()[-1] | {"step": 3})
        checkpoint = path / "checkpoints" / "step-000003"
        checkpoint.mkdir(parents=True)
        (checkpoint / "facts.json").write_text(json.dumps(vouched(facts | {"step": 3})))
        return latest(self)

    monkeypatch.setattr(Checkpoints, "latest", after_another_step)
    assert read_run(path).num_steps == 3


def test_who_is_refused_by_a_lock_of_its_own_process_does_not_free_it(tmp_path: Path) -> None:
    """The kernel gives a record lock back when its process closes any descriptor of the file."""
    lock = RunLock(tmp_path)
    lock.acquire()
    with (
        pytest.raises(RecipeError, match="another process is training"),
        RunFolder(tmp_path).taken(alone(), resume=True),
    ):
        pass

    def another() -> None:
        lock_module._held_here.clear()
        try:
            RunLock(tmp_path).acquire()
        except CacheBusyError:
            os._exit(0)
        os._exit(1)

    process = FORK.Process(target=another)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    lock.close()


@pytest.mark.parametrize("before", ["export", "one"])
def test_of_two_exports_at_once_the_later_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """The other one takes its place before the old export, or the new one, is moved."""
    out = tmp_path / "export"
    for name in ("export", "one", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "told").write_text(name)
    rename, others = Path.rename, [tmp_path / "another"]

    def late(path: Path, target: Path) -> Path:
        if path.name == before and others:
            _replace_folder(others.pop(), out)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    _replace_folder(tmp_path / "one", out)
    assert not others
    assert (out / "told").read_text() == "one"
    assert list(tmp_path.iterdir()) == [out]


# --- caches -----------------------------------------------------------------------------------------------


def test_a_shard_that_another_process_removes_to_repair_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(tmp_path, range(10))
    reader, require = CacheReader(str(tmp_path)), VerifiedFiles.require

    def removed_before(self: VerifiedFiles, path: Path, sha256: str, *, where: str) -> None:
        path.unlink()
        require(self, path, sha256, where=where)

    monkeypatch.setattr(VerifiedFiles, "require", removed_before)
    assert broken_shards(reader) == reader.manifest.shards.names()


def test_a_shard_that_the_commit_removes_as_a_second_one_needs_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CacheWriter.open(str(tmp_path), make_identity(), created_by=VERSIONS) as writer:
        (unit,) = writer.plan(keys_and_rows(range(3)), examples_per_shard=5).units
        with writer.unit(unit) as shard:
            for number in range(3):
                shard.add(make_row(number))
    (path,) = (tmp_path / "shards").iterdir()
    stat = Path.stat

    def removed_before(self: Path, **options: Any) -> os.stat_result:
        if self == path:
            os.remove(path)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", removed_before)
    require_space(str(tmp_path), unit, num_units_left=1)
    assert LocalFolder(tmp_path).names("shards/") == []
