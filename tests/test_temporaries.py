"""Files that several processes write at once, and what those leave that are killed meanwhile."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.cache.storage import LocalFolder
from shared.regular_files import write_output
from shared.temporaries import is_temporary
from stage2_student.evaluation.evaluated import STUDENT, Evaluated
from stage2_student.evaluation.scores import read_scores, save
from stage2_student.runs.files import write_bytes

FORK = multiprocessing.get_context("fork")
Write = Callable[[Path, bytes], object]


def published(path: Path, data: bytes) -> None:
    LocalFolder(path.parent).publish(path.name, data)


@pytest.fixture(params=[write_output, write_bytes, published])
def write(request: pytest.FixtureRequest) -> Write:
    found: Write = request.param
    return found


def killed_before_the_rename(write: Write, path: Path) -> int:
    """The number of a process that was."""

    def work() -> None:
        os.replace = lambda *_: os._exit(0)
        write(path, b"half")

    process = FORK.Process(target=work)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert process.pid is not None
    return process.pid


def as_imported_by_a_process() -> Any:
    spec = importlib.util.find_spec("shared.temporaries")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def between_write_and_rename(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Of the next file."""
    replace = os.replace

    def late(*paths: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        happens()
        replace(*paths)

    monkeypatch.setattr(os, "replace", late)


def test_of_two_writers_at_once_the_later_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path, seen = tmp_path / "results.json", []

    def another_writes() -> None:
        assert list(tmp_path.glob("*.json")) == []  # which finds hidden files as well
        write(path, b"another")
        seen.append(path.read_bytes())

    between_write_and_rename(monkeypatch, another_writes)
    write(path, b"one")
    assert (seen, path.read_bytes()) == ([b"another"], b"one")
    assert list(tmp_path.iterdir()) == [path]


def test_two_evaluations_at_once_leave_a_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, found = tmp_path / "validation.parquet", [Evaluated(STUDENT, "export", ())]
    between_write_and_rename(monkeypatch, lambda: save(found, place))
    save(found, place)
    assert [one["model"] for one in read_scores(place)] == [STUDENT]


@pytest.mark.parametrize("write", [write_output, write_bytes])
def test_what_a_killed_writer_left_is_gone_with_the_next_write(tmp_path: Path, write: Write) -> None:
    path, other = tmp_path / "results.json", tmp_path / "other.json"
    killed_before_the_rename(write, path)
    killed_before_the_rename(write, other)
    assert len(list(tmp_path.iterdir())) == 2
    write(path, b"whole")
    left, found = sorted(tmp_path.iterdir())
    assert (found, found.read_bytes()) == (path, b"whole")
    assert is_temporary(left.name, of="other.json")


def test_a_process_with_the_number_of_one_that_was_killed_uses_other_names(tmp_path: Path) -> None:
    """As in a container that is started again, where the same program has the same number."""
    first, second = (as_imported_by_a_process() for _ in range(2))
    left = tmp_path / first.temporary_name("results.json")
    assert left.name.split(".")[:3] == second.temporary_name("results.json").split(".")[:3]
    assert left.name != second.temporary_name("results.json")
    assert second.writer_is_dead(left)
    left.mkdir()  # as of an export
    (left / "model.safetensors").touch()
    first.remove_left(tmp_path / "results.json")
    assert left.exists()
    second.remove_left(tmp_path / "results.json")
    assert not left.exists()
