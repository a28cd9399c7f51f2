"""Slurm's programs, played on one machine: ``srun`` starts a task for each node, and hands signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "docs" / "slurm"

# Of srun's own options all are of one word; the step's status is the largest of its tasks'.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
tasks=()
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
    status=0
    wait "$task" || status=$?
    while kill -0 "$task" 2>/dev/null; do status=0; wait "$task" || status=$?; done
    [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) for ((node = 0; node < SLURM_NNODES; node++)); do echo 127.0.0.1; done ;;
requeue) echo "$2" >>"$REQUEUED" ;;
*) exit 1 ;;
esac
"""


class Slurm:
    """A place where jobs of two nodes run, of one process each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requeued = folder / "requeued"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._path = f"{programs}:{os.environ['PATH']}"
        self._num_started = 0

    def start(self, script: str, *arguments: str, nodes: int = 2, **variables: str) -> subprocess.Popen[str]:
        """A job's shell, as Slurm starts it; the output of all goes to ``job-N``."""
        self._num_started += 1
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
            "PATH": self._path,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "NPROC": "1",
            "OMP_NUM_THREADS": "1",
            "PET_LOCAL_ADDR": "127.0.0.1",
            "SLURM_JOB_ID": str(os.getpid() % 10000 + 10000 * self._num_started),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": str(nodes),
            "REQUEUED": str(self.requeued),
            **variables,
        }
        with self.output(self._num_started).open("w") as output:
            return subprocess.Popen(
                ["bash", str(SCRIPTS / script), *arguments],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def output(self, number: int) -> Path:
        return self.folder / f"job-{number}"

    def said(self) -> str:
        """By all jobs."""
        return "\n".join(self.output(number + 1).read_text() for number in range(self._num_started))


def descendants(pid: int) -> list[int]:
    """Of a process, those that it has started and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended meanwhile
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def agents(job: subprocess.Popen[str]) -> list[int]:
    """The processes of torchrun on a job's nodes, oldest first; not what one of them has forked for a moment."""
    found = {pid for pid in descendants(job.pid) if _command_line(pid)[1:3] == ["-m", "shared.pipeline"]}
    return sorted(found - {child for pid in found for child in descendants(pid)})


def kill_machine(agent: int) -> None:
    """An agent and all that it has started, at once."""
    for pid in [agent, *descendants(agent)]:
        os.kill(pid, signal.SIGKILL)


def wait_until(is_so: object, job: subprocess.Popen[str], *, within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():  # type: ignore[operator]
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def end(job: subprocess.Popen[str], *, within_s: float = 240.0) -> int:
    """Its status; nothing of it is left."""
    try:
        return job.wait(timeout=within_s)
    finally:
        for pid in [*descendants(job.pid), *([job.pid] if job.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> Sequence[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
