"""Runs of students for benchmarks: what a training reads and holds, failures, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shared.recipes.policies import Threshold
from shared.runtime import World, distributed
from tests.benchmarks import bench_peers, student_runs
from tests.benchmarks.peers.live import LiveTeacher
from tests.benchmarks.student_results import (
    LABELS,
    LIVE,
    TIMED,
    Results,
    append_line,
    done,
    keep,
    read_lines,
)
from tests.benchmarks.student_runs import (
    Job,
    Teaching,
    Training,
    fingerprint,
    require_all,
    run_missing,
    time_missing,
    time_steps,
)

NUM_STEPS = 2  # of an epoch over the eight rows, four in a step


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench_peers, "in_own_process", here)
        return bench_peers.tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def world() -> Iterator[World]:
    with distributed(device="cpu") as world:
        yield world


def job_of(recipe: str, length: str, variant: str = LABELS, teaching: Teaching = None) -> Job:
    return Job(recipe, variant, length, 0, 0.5, teaching, Path(recipe).parent)


def jobs_of(recipe: str) -> list[Job]:
    return [job_of(recipe, TIMED), job_of(recipe, TIMED, LIVE, LiveTeacher())]


# --- a training ------------------------------------------------------------------------------------------


def test_rows_that_repeat_are_encoded_before_the_first_step(recipe: str, world: World) -> None:
    training = Training(job_of(recipe, "20 epochs"), world)
    encode: Any = training.inputs.processor.encode
    for num_steps in 0, NUM_STEPS + 1:
        list(islice(training.steps(), num_steps))
        assert encode.cache_info().misses == training.inputs.train.num_examples == 8


@pytest.mark.parametrize("length", ["1 epoch", TIMED])
def test_rows_that_are_read_once_are_not_held(recipe: str, world: World, length: str) -> None:
    assert not hasattr(Training(job_of(recipe, length), world).inputs.processor.encode, "cache_info")


def test_a_training_has_the_other_settings_of_its_recipe(
    recipe: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = student_runs.load_recipe

    def with_chunks(name: str) -> Any:
        found = load(name)
        return found.model_copy(update={"loss": found.loss.model_copy(update={"chunk_size": 3})})

    monkeypatch.setattr(student_runs, "load_recipe", with_chunks)
    for job in jobs_of(recipe):
        loss = Training(job, world).loss
        assert (loss.chunk_size, loss.kd_ratio) == (3, 0.0 if job.variant == LABELS else 0.5)


def test_a_length_has_no_more_rows_than_its_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has none of the others."""
    load = student_runs.load_recipe

    def limited(name: str) -> Any:
        found = load(name)
        return found.model_copy(update={"data": found.data.model_copy(update={"limit": 5})})

    assert job_of(recipe, "20 epochs").load().data.limit == 240
    monkeypatch.setattr(student_runs, "load_recipe", limited)
    assert job_of(recipe, "20 epochs").load().data.limit == 5


# --- turns -----------------------------------------------------------------------------------------------


def test_turns_end_with_the_epoch_and_go_on_after_a_stop(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, taken = Training.steps, []

    def counted(self: Training, *, begin: int = 0) -> Iterator[float]:
        for _ in steps(self, begin=begin):
            if len(taken) == 3:  # in the second turn
                raise KeyboardInterrupt
            taken.append(len(taken) + 1.0)
            yield taken[-1]

    kept, jobs = tmp_path / "turns.jsonl", jobs_of(recipe)
    monkeypatch.setattr(Training, "steps", counted)
    with pytest.raises(KeyboardInterrupt):
        time_steps(jobs, 20, kept)
    assert [turn["seconds"] for turn in read_lines(kept)] == [[1.0, 2.0]]

    taken[:] = [0.0] * 4
    ratios = [5 / 6, 2 / 1]  # in the second turn the other one was first
    quartiles = [np.quantile(ratios, share) for share in (0.25, 0.5, 0.75)]
    assert time_steps(jobs, 20, kept) == [[1, 1, 1], pytest.approx(quartiles)]
    assert len(taken) == 6
    assert time_steps(jobs, 1, kept) == [[1, 1, 1], [2, 2, 2]]
    assert len(taken) == 6


# --- what was measured with another recipe or teacher ----------------------------------------------------


def changed(recipe: str, section: str, **settings: Any) -> None:
    tree = yaml.safe_load(Path(recipe).read_text())
    tree[section] |= settings
    Path(recipe).write_text(yaml.safe_dump(tree))


def test_figures_of_another_recipe_or_teacher_are_not_those_asked_for(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[float] = []

    def run(job: Job) -> dict[str, Any]:
        ran.append(1.0 + len(ran))
        return {"kl": ran[-1]}

    monkeypatch.setattr(student_runs, "in_own_process", here)
    monkeypatch.setattr(student_runs, "run", run)
    shutil.copytree(Path(recipe).parent / "base", tmp_path / "base")
    shutil.copy(recipe, tmp_path)
    own = str(tmp_path / Path(recipe).name)
    changed(own, "teacher", model=str(tmp_path / "base"))
    assert fingerprint(own) == fingerprint(recipe)  # wherever it lies
    results = tmp_path / "students.jsonl"

    def measured() -> dict[int, float]:
        for _ in range(2):
            assert run_missing([job_of(own, "1 epoch")], results) == []
        found = Results("tiny", 0.5, results, fingerprint=fingerprint(own))
        return found.values(LABELS, "1 epoch", "kl")

    assert measured() == {0: 1.0}
    changed(own, "optimization", learning_rate=0.5)
    assert measured() == {0: 2.0}
    with next((tmp_path / "base").glob("*.safetensors")).open("ab") as file:
        file.write(b"0")
    assert measured() == {0: 3.0}
    assert {*done(results).popitem()[1]} == {"key", "fingerprint", "date", "commit", "kl"}


# --- failures --------------------------------------------------------------------------------------------


def test_one_that_fails_does_not_end_the_others(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(job: Job) -> dict[str, Any]:
        if job.variant == LIVE:
            raise OSError("no space left")
        return {"kl": 1.0}

    timed: list[str] = []

    def times(jobs: list[Job], num_turns: int, kept: Path) -> list[list[float]]:
        timed.extend(job.variant for job in jobs)
        append_line(kept, {"keys": []})
        return [[0.9, 1.0, 1.1] for _ in jobs]

    monkeypatch.setattr(student_runs, "in_own_process", here)
    monkeypatch.setattr(student_runs, "capture_for", lambda job: None)
    monkeypatch.setattr(student_runs, "run", run)
    monkeypatch.setattr(student_runs, "time_steps", times)
    teachings: dict[str, Teaching] = {LABELS: None, LIVE: LiveTeacher(), "tau 1/64": Threshold(tau=1 / 64)}

    def jobs(length: str) -> list[Job]:
        return [job_of(recipe, length, name, teaching) for name, teaching in teachings.items()]

    results = tmp_path / "students.jsonl"
    failed = run_missing(jobs("1 epoch"), results)
    failed += time_missing(jobs(TIMED), results, but=failed)
    assert [json.loads(key)[1] for key in done(results)] == [LABELS, "tau 1/64"] * 2
    assert timed == [LABELS, "tau 1/64"]
    assert list(tmp_path.iterdir()) == [results]
    assert "no space left" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"tiny \| teacher live \| 1 epoch"):
        require_all(failed)
    require_all([])

    labels_fail = [job_of(recipe, "1 epoch").key]
    untimed = time_missing(jobs(TIMED), tmp_path / "none", but=labels_fail)
    assert [key[1] for key in untimed] == [LIVE, "tau 1/64"]
    assert "nothing to compare with" in capsys.readouterr().err


def test_a_line_that_was_cut_off_is_left_out_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "students.jsonl"
    keep(["a"], {"kl": 1.0}, path, fingerprint="b")
    whole = path.read_text()
    path.write_text(whole + whole[:9])
    assert list(done(path)) == ['["a"]']
    append_line(path, {"key": ["b"]})
    assert path.read_text() == whole + '{"key": ["b"]}\n'
