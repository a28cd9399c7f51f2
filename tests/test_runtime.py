"""The first signal asks, the second one ends; and ranks wait for each other as long as it is right to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stage2_runs import on_ranks

import shared.stopping as stopping
from shared.errors import DataError, RecipeError, TrainingError, is_out_of_memory
from shared.runtime import World, distributed, environment
from shared.stopping import GO_ON, SAME_REQUEST_S, SIGNALS, command_to_go_on, stop_on_signals

FORK = multiprocessing.get_context("fork")


def _work_until_asked(ready: Any, asked: Any, clock: Any) -> None:
    """Goes on for a minute after it was asked to stop, as a step of a large model would."""
    stopping.time = SimpleNamespace(monotonic=lambda: clock.value)  # type: ignore[assignment]
    with stop_on_signals() as stop:
        ready.set()
        while not stop.received:
            time.sleep(0.01)
        asked.set()
        time.sleep(60)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(first: signal.Signals, second: signal.Signals) -> None:
    ready, asked, clock = FORK.Event(), FORK.Event(), FORK.Value("d", 0.0)
    process = FORK.Process(target=_work_until_asked, args=(ready, asked, clock))
    process.start()
    assert ready.wait(30)
    assert process.pid is not None
    os.kill(process.pid, first)
    assert asked.wait(30)
    if first == second == signal.SIGTERM:
        clock.value = SAME_REQUEST_S / 2
        os.kill(process.pid, second)  # handed on by a launcher: the same request
        process.join(timeout=0.5)
        assert process.exitcode is None
    clock.value = 2 * SAME_REQUEST_S
    os.kill(process.pid, second)
    process.join(timeout=30)
    assert process.exitcode == -second


def test_a_signal_after_another_rank_has_asked_is_the_first_one() -> None:
    with stop_on_signals() as stop:
        stop.received = True  # as ranks agree
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_handler_of_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert signal.getsignal(number) != before
        assert not stop.received
    assert signal.getsignal(number) == before


@pytest.fixture
def activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs of an environment that a shell finds them in."""
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "train-student"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    return folder


def test_the_command_to_go_on_is_what_was_typed(activated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = str(activated / "train-student")
    monkeypatch.setattr(sys, "argv", [program, "run", "mine.yaml", "--set", "a.b=[1, 2]"])
    assert command_to_go_on(resume=True) == "train-student run mine.yaml --set 'a.b=[1, 2]' --resume"
    assert command_to_go_on(resume=False) == "train-student run mine.yaml --set 'a.b=[1, 2]'"
    monkeypatch.setattr(sys, "argv", ["/tree/stage1_teacher/__main__.py", "capture", "phantom", "--resume"])
    assert command_to_go_on(resume=True) == "python -m stage1_teacher capture phantom --resume"
    monkeypatch.setenv("RANK", "0")
    assert command_to_go_on(resume=False) == "the same torchrun command"
    monkeypatch.setenv(GO_ON, "make train-student ARGS=--resume")
    assert command_to_go_on(resume=True) == "make train-student ARGS=--resume"


@pytest.mark.parametrize("path", [os.defpath, "other"], ids=["nothing", "another one"])
def test_a_program_that_a_shell_does_not_find_by_its_name_is_told_by_its_path(
    activated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """As where the environment is not activated, or another one is."""
    (tmp_path / "other").mkdir()
    for name in ("python", "train-student"):
        (tmp_path / "other" / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", ["bin/train-student", "run", "mine.yaml"])
    assert command_to_go_on(resume=True) == "bin/train-student run mine.yaml --resume"
    monkeypatch.setattr(sys, "argv", ["/tree/stage1_teacher/__main__.py", "capture", "phantom"])
    assert command_to_go_on(resume=False) == f"{activated}/python -m stage1_teacher capture phantom"
    monkeypatch.setattr(sys, "orig_argv", ["bin/python"])
    assert command_to_go_on(resume=False) == "bin/python -m stage1_teacher capture phantom"


def test_make_is_told_what_make_was_told(activated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.pipeline import typed

    monkeypatch.delenv("MAKELEVEL", raising=False)
    said = ("train-student", "mine.yaml", ["run.name=a b"], 2, ["--resume"])
    alone = "python -m shared.pipeline train-student mine.yaml --nproc 2 --set 'run.name=a b' --resume"
    assert typed(*said) == alone
    monkeypatch.setenv("MAKELEVEL", "1")
    echoed = subprocess.run(
        ["bash", "-c", f"make() {{ printf '%s\\n' \"$@\"; }}; {typed(*said)}"], capture_output=True
    )
    assert echoed.stdout.decode().splitlines() == [
        "train-student",
        "RECIPE=mine.yaml",
        "NPROC=2",
        "ARGS=--set 'run.name=a b' --resume",
    ]


def test_a_number_of_processes_that_nobody_gave_is_not_told(
    activated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.pipeline import AUTO, typed

    said = ("train-student", "mine.yaml", [], AUTO, [])
    monkeypatch.setenv("MAKELEVEL", "1")
    assert typed(*said) == "make train-student RECIPE=mine.yaml"
    monkeypatch.delenv("MAKELEVEL")
    assert typed(*said) == "python -m shared.pipeline train-student mine.yaml --nproc auto"


@pytest.mark.parametrize(("gpus", "expected"), [(3, 3), (1, 1), (0, 1)])
def test_auto_is_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, expected: int) -> None:
    from shared.pipeline import AUTO, num_processes

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert num_processes(AUTO) == expected
    assert num_processes(5) == 5


SHORT_S = 4.0  # in which forks meet on a machine that is busy, too
LATE_S = 1.5 * SHORT_S


def test_ranks_wait_for_the_first_one_longer_than_for_a_collective() -> None:
    def work(world: World) -> tuple[str, bool]:
        found = world.by_main(lambda: time.sleep(LATE_S) or "found")
        return found, world.any(world.rank == 1)

    assert on_ranks(2, work, collective_timeout_s=SHORT_S) == [("found", True)] * 2


def test_an_error_of_the_first_rank_is_raised_on_all() -> None:
    def refuse() -> None:
        raise DataError("row 3")

    def work(world: World) -> str:
        with pytest.raises(DataError, match="row 3") as raised:
            world.by_main(refuse)
        return str(raised.value)

    assert on_ranks(2, work) == ["row 3"] * 2


def test_a_rank_that_is_late_for_a_collective_ends_the_others() -> None:
    def work(world: World) -> None:
        if world.is_main:
            time.sleep(LATE_S)
            raise DataError("of no interest here")
        dist.all_reduce(torch.ones(1))

    ended = on_ranks(2, work, collective_timeout_s=SHORT_S, errors=True)
    assert isinstance(ended[1], TrainingError)
    assert f"more than {SHORT_S:g} s (parallel.collective_timeout_s)" in str(ended[1])


def test_of_the_ranks_errors_the_one_that_ended_the_others_is_raised() -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            raise DataError("row 3")
        world.barrier()

    with pytest.raises(DataError, match="row 3"):
        on_ranks(2, work)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_never_comes_ends_with_one_error(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(TrainingError, match="did not come within 1 s"),
        distributed(device="cpu", collective_timeout_s=1),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_PORT": "TAKEN"}, "address already in use"),
        ({"MASTER_PORT": "here"}, "here"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR expected"),
        ({"WORLD_SIZE": "two"}, "two"),
    ],
)
def test_a_place_where_ranks_cannot_meet_is_one_error(
    changed: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | changed
        for name, value in place.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, port if value == "TAKEN" else value)
        with pytest.raises(RecipeError) as refused, distributed(device="cpu", collective_timeout_s=1):
            pass
    assert said in str(refused.value)
    assert "torchrun" in str(refused.value)


def test_a_rank_that_dies_before_all_know_each_other_ends_the_others() -> None:
    """It has joined, and is gone when the group is made in which ranks wait for each other without limit."""

    def work(world: World) -> None:
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        world.forget_groups()
        world.barrier()

    ended = on_ranks(2, work, collective_timeout_s=SHORT_S, errors=True)
    assert isinstance(ended[1], TrainingError)


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_rank_that_dies_ends_those_that_wait_for_it(doomed: int) -> None:
    def work(world: World) -> None:
        if world.rank == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()

    ended = on_ranks(2, work, errors=True)
    assert isinstance(ended[1 - doomed], TrainingError)
    assert "another process of this job has ended" in str(ended[1 - doomed])


def test_the_commit_is_never_that_of_a_repository_around_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / ".venv/lib/shared/runtime.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (tmp_path / "mine.yaml").touch()
    as_me = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q"], ["add", "mine.yaml"], [*as_me, "commit", "-qm", "mine"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr("shared.runtime.__file__", str(installed))
    assert environment()["commit"] is None
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", str(installed)], check=True)
    assert str(environment()["commit"]).endswith("-dirty")


WITHOUT_THREADS = """
import os, resource
from shared.errors import is_out_of_memory
from shared.runtime import distributed

with distributed(device="cpu") as world:
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    soft = pages * resource.getpagesize() + (4 << 20)  # less than a thread's stack
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    try:
        world.background_group
    except RuntimeError as error:
        print("told" if is_out_of_memory(error) else error, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (before, hard))
    os._exit(0)
"""


def test_a_group_without_memory_for_its_threads_is_an_error() -> None:
    """gloo itself ends the process, or says that a resource is temporarily unavailable."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def test_what_gloo_says_without_memory_for_threads_is_known_as_that() -> None:
    assert is_out_of_memory(RuntimeError("Resource temporarily unavailable"))
