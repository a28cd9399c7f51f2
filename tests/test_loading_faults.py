"""What goes wrong in data-loader workers ends in one message, and never in a wait without end."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from shared.data.loading import (
    PackedDataset,
    _is_of_the_handover,
    _lacks_descriptors,
    _says_that_a_worker_died,
    begin_worker,
    loaded_items,
)
from shared.errors import TrainingError

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
    from test_loading_faults import load
    print("loaded", sum(item["pixels"][0].item() for item in load()))
"""


class Pictures(Dataset):
    """Large items, and something that happens in the worker before the fourth."""

    def __init__(self, fault: Callable[[], None] = lambda: None) -> None:
        self.fault = fault

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 3:
            self.fault()
        return {"pixels": torch.full((1 << 20,), float(index))}


def load(fault: Callable[[], None] = lambda: None) -> list[Any]:
    source = PackedDataset(Pictures(fault), workers_setting="run.num_workers")
    loader: DataLoader = DataLoader(
        source, sampler=range(8), batch_size=None, num_workers=1, worker_init_fn=begin_worker
    )
    return list(loaded_items(loader, workers_setting="run.num_workers"))


def without_memory() -> None:
    """A file in memory obeys this limit too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without_memory, r"cannot hand over .*too large.* Lower run\.num_workers"),
        (killed, r"a data-loader worker died: .*lower run\.num_workers"),
    ],
)
def test_a_fault_of_a_worker_is_one_error(fault: Callable[[], None], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load(fault)


@pytest.mark.slow
def test_a_long_folder_for_temporary_files_is_no_hindrance(tmp_path: Path) -> None:
    """Longer than the address of a socket may be."""
    long = tmp_path / ("scratch_of_a_project" * 5)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "loaded 28.0" in done.stdout, done.stderr


@pytest.mark.parametrize("spare", range(7))
def test_a_worker_without_descriptors_is_one_error_and_no_wait(
    spare: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """It lacks one for the buffer, or it has enough for those on their way: some of them may have been taken."""

    def few() -> None:
        used = len(os.listdir("/proc/self/fd")) - 1
        limit = used + spare if spare else 3  # with none, a wait for one file is an error
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    message = ""
    try:
        assert len(load(few)) == 8
    except TrainingError as error:
        message = str(error)
    assert bool(message) or spare > 0
    assert not message or spare < 6
    words = ("is out of file descriptors", "ulimit -n", "run.num_workers")
    assert not message or all(word in message for word in words)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("missing", [errno.EMFILE, errno.EACCES, errno.ENOENT])
def test_a_parent_that_cannot_take_what_was_read_says_why(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no descriptor left, it may not open other processes' files, or the worker is gone."""
    words = {
        errno.EMFILE: "is out of file descriptors",
        errno.EACCES: "may not open its workers' files in /proc. Do without workers (run.num_workers=0)",
        errno.ENOENT: "a data-loader worker died: before its parent took what it had read",
    }
    own, open_file = os.getpid(), os.open

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if os.getpid() == own and str(path).startswith("/proc/"):
            raise OSError(missing, os.strerror(missing), path)
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(TrainingError, match=re.escape(words[missing])):
        load()


def test_errors_of_the_thread_that_pins_are_told_apart() -> None:
    """It wraps them: their text has the number and the file, and they have neither."""
    wrapped = {
        kind: kind(
            f"Caught {kind.__name__} in pin memory thread for device 0.\n{kind.__name__}: [Errno {number}] '{path}'"
        )
        for kind, number, path in (
            (OSError, errno.EMFILE, "/proc/7/fd/9"),
            (FileNotFoundError, errno.ENOENT, "/proc/7/fd/9"),
            (PermissionError, errno.EACCES, "/proc/7/fd/9"),
        )
    }
    assert _lacks_descriptors(wrapped[OSError])
    assert _says_that_a_worker_died(wrapped[FileNotFoundError])
    assert _is_of_the_handover(wrapped[PermissionError])


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.\n... '/proc/7/fd/9'"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/processed/7.png"),
    ],
    ids=["in a worker", "without workers"],
)
def test_a_missing_file_of_the_data_is_no_dead_worker(error: Exception) -> None:
    assert not _says_that_a_worker_died(error)
    assert not _is_of_the_handover(error)


def test_that_a_worker_died_is_told_where_items_are_asked_for_alone() -> None:
    """Not by a signal handler of torch's, in the middle of a step."""
    before = signal.getsignal(signal.SIGCHLD)
    assert len(load()) == 8
    assert signal.getsignal(signal.SIGCHLD) is before


def test_stop_signals_mean_nothing_of_the_parents_to_a_worker() -> None:
    def check() -> None:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)

    assert len(load(check)) == 8


PARENT_THAT_IS_KILLED = """
import os, signal, sys
from test_loading_faults import load

def stop_where_a_worker_begins():
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)

def die_when_it_has_stopped():
    os.waitid(os.P_ALL, 0, os.WSTOPPED)  # no handler: the loader sets its own, perhaps before the worker stops
    os.kill(os.getpid(), signal.SIGKILL)

os.register_at_fork(after_in_parent=die_when_it_has_stopped, after_in_child=stop_where_a_worker_begins)
load()
"""


def test_a_worker_whose_parent_is_killed_while_it_starts_ends(tmp_path: Path) -> None:
    """torch's own look at the parent takes whoever is the parent by then for the one to outlive."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT_THAT_IS_KILLED, str(tmp_path / "pid")],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    worker = int((tmp_path / "pid").read_text())
    os.kill(worker, signal.SIGCONT)
    wait_until_gone(worker, seconds=20)


def wait_until_gone(pid: int, *, seconds: float) -> None:
    """Raises   AssertionError  after it has killed a process that was not over in time"""
    deadline = time.monotonic() + seconds
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} is still there after {seconds} s")
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie, which nobody here may collect, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def in_a_namespace(size: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where ``/dev/shm`` is of that size."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    script = f"{mount} && exec {sys.executable} -c '{textwrap.dedent(code)}'"
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


FILLED = """
    with open("/dev/shm/full", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
"""


@pytest.mark.slow
def test_items_larger_than_shared_memory_arrive() -> None:
    """Docker gives 64 MB; here one item of 4 MiB is more than there is."""
    done = in_a_namespace("1m", LOAD)
    assert "loaded 28.0" in done.stdout, done.stderr


@pytest.mark.slow
def test_shared_memory_without_room_for_a_semaphore_is_one_error() -> None:
    done = in_a_namespace("64k", FILLED + LOAD)
    assert "Exception ignored" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "TrainingError: data-loader workers cannot be started" in last
    for word in ("/dev/shm", "0.0625 MiB", "--shm-size", "run.num_workers=0"):
        assert word in last
