"""The two command lines in processes of their own, with limits of time and memory, and with faults.

    ended = run("teacher-cache", ["verify", str(cache)], limit_s=60)
    ended.status, ended.said

Processes are forked from this one, which has imported everything: a start takes milliseconds.  A child that is not at
its end in time is killed, and so is everything that it leaves behind.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import stage1_teacher.__main__ as teacher_cache
import stage2_student.__main__ as train_student
from shared import cli
from tests.rendezvous import Rendezvous

GROUPS = {"teacher-cache": teacher_cache.commands, "train-student": train_student.commands}
LIMIT_S = 90.0
LEFT_BEHIND_S = 15.0  # how long workers of a dead process may take to notice
POLL_S = 0.01
SUBREAPER = 36  # prctl's number: orphans of our children become ours


@dataclass(frozen=True)
class Ended:
    """A process that is over.

    status  None where it had to be killed for being late
    said    on both of its outputs
    """

    status: int | None
    said: str


@dataclass
class Running:
    pid: int
    output: Path
    rank: int = 0
    rendezvous: Rendezvous | None = None  # must last as long as the process

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def is_over(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end_within(self, seconds: float) -> Ended:
        return self.end(deadline_s=time.monotonic() + seconds)

    def end(self, *, deadline_s: float) -> Ended:
        """Waits; kills it where it is late."""
        late = False
        while not self.is_over():
            if time.monotonic() > deadline_s:
                self.kill()
                late = True
            time.sleep(POLL_S)
        _, status = os.waitpid(self.pid, 0)
        said = self.output.read_text(errors="replace")
        self.output.unlink()
        return Ended(None if late else os.waitstatus_to_exitcode(status), said)


def adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def start(program: str, arguments: Sequence[str], *, before: Callable[[], None] | None = None) -> Running:
    """Begins a command.

    before  called in the new process: to set limits and faults
    """
    return spawn(lambda: _command(program, arguments), before=before)


def start_ranks(
    program: str, arguments: Sequence[str], num_ranks: int, *, before: Callable[[int], None] | None = None
) -> list[Running]:
    """Begins a command on several processes, as torchrun does."""
    rendezvous = Rendezvous()

    def prepare(rank: int) -> None:
        os.environ |= rendezvous.environment(rank, num_ranks)
        if before is not None:
            before(rank)

    running = [
        start(program, arguments, before=lambda rank=rank: prepare(rank))  # type: ignore[misc]
        for rank in range(num_ranks)
    ]
    for one in running:
        one.rendezvous = rendezvous
    return running


def spawn(work: Callable[[], int], *, before: Callable[[], None] | None = None) -> Running:
    """Does any work in a new process, whose status is what it returns."""
    handle, name = tempfile.mkstemp(prefix="torture-")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(handle)
        return Running(pid, Path(name))
    status = 1
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if before is not None:
            before()
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _command(program: str, arguments: Sequence[str]) -> int:
    sys.argv = [program, *arguments]
    cli.run(GROUPS[program])  # leaves by SystemExit
    return 0


def run(
    program: str,
    arguments: Sequence[str],
    *,
    before: Callable[[], None] | None = None,
    limit_s: float = LIMIT_S,
) -> Ended:
    """A command from start to end."""
    return start(program, arguments, before=before).end_within(limit_s)


def run_ranks(
    program: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    before: Callable[[int], None] | None = None,
    limit_s: float = LIMIT_S,
) -> list[Ended]:
    running = start_ranks(program, arguments, num_ranks, before=before)
    deadline = time.monotonic() + limit_s
    return [one.end(deadline_s=deadline) for one in running]


def clear_left_behind() -> list[int]:
    """Ends what commands have left; returns those that did not go by themselves in time."""
    deadline = time.monotonic() + LEFT_BEHIND_S
    while (left := _children()) and time.monotonic() < deadline:
        _reap(left)
        time.sleep(POLL_S)
    left = _children()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    while _children():
        _reap(_children())
        time.sleep(POLL_S)
    return left


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _reap(pids: Sequence[int]) -> None:
    for pid in pids:
        os.waitpid(pid, os.WNOHANG)


def limit_memory(more_bytes: int) -> None:
    """Of this process, above what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
