"""CPU threads: set where every command starts, shared by processes side by side, the user's where given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.threads import num_cores, quota_cores, share_cores, threads_per_process

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared", "stage1_teacher", "stage2_student")
# Python imports it at its start; it says at the end what libraries have been told.
AT_EXIT = """
import atexit, os
atexit.register(lambda: print("threads:", os.environ["OMP_NUM_THREADS"]))
"""


def threads_of(module: str, folder: Path, **variables: str) -> int:
    (folder / "sitecustomize.py").write_text(AT_EXIT)
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env=kept | {"PYTHONPATH": f"{folder}:{ROOT}"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"^threads: (\d+)$", done.stdout, flags=re.MULTILINE)
    assert found is not None, done.stdout
    return int(found[1])


@pytest.mark.parametrize("module", ["stage1_teacher", "shared.phantom"])
def test_a_command_leaves_a_core_to_its_worker(module: str, tmp_path: Path) -> None:
    assert threads_of(module, tmp_path) == threads_per_process()


def test_the_users_number_stands(tmp_path: Path) -> None:
    assert threads_of("stage1_teacher", tmp_path, OMP_NUM_THREADS=str(num_cores())) == num_cores()


def test_peers_share_the_cores(tmp_path: Path) -> None:
    assert threads_of("stage2_student", tmp_path, LOCAL_WORLD_SIZE=str(num_cores())) == 1


def test_every_command_starts_in_the_same_place() -> None:
    """``run`` of shared.cli, which sets the threads; ``shared.recipes`` prints a page and computes nothing."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    started = [path for path in files if 'if __name__ == "__main__"' in path.read_text()]
    assert len(started) >= 5
    for path in started:
        if path.relative_to(ROOT) != Path("shared/recipes/__main__.py"):
            text = path.read_text()
            assert re.search(r"^    run(_group)?\(\w+(, \w+=.+)?\)$", text, flags=re.MULTILINE), path


@pytest.mark.parametrize(("num_processes", "threads"), [(1, 15), (2, 7), (4, 3), (8, 1), (16, 1), (40, 1)])
def test_processes_side_by_side(num_processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.threads.num_cores", lambda: 16)
    environment: dict[str, str] = {}
    share_cores(environment, num_processes)
    assert environment["OMP_NUM_THREADS"] == str(threads)
    share_cores(environment, 16)
    assert environment["OMP_NUM_THREADS"] == "1", "what was set here may be shared again"
    environment = {"OMP_NUM_THREADS": "7"}
    share_cores(environment, num_processes)
    assert environment == {"OMP_NUM_THREADS": "7"}, "the user's number stands"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_may_have_the_time_of_fewer_cores(
    files: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cores(tmp_path) == cores
    monkeypatch.setattr("shared.threads.CGROUPS", tmp_path)
    assert num_cores() == min(len(os.sched_getaffinity(0)), cores or sys.maxsize)
