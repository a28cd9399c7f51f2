"""Too little of something: disk, shared memory, memory, descriptors, length of files.  Then enough, and on.

A command under the shortage ends in one error, or in the right result; the same command afterwards comes to the
result of one that never lacked anything.  Disks and ``/dev/shm`` are small file systems in a mount namespace.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.torture.cases import CannotRunError, Outcome, Result
from tests.torture.commands import clear_left_behind, limit_memory, run, spawn
from tests.torture.judging import judge
from tests.torture.materials import RUN, Materials, cache_files, difference, run_content

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # unshare's flags
LIMIT_S = 120.0


@dataclass(frozen=True)
class Job:
    program: str
    arguments: list[str]
    again: list[str]
    fault: Callable[[], str | None]


def _job(things: Materials, folder: Path, chance: random.Random) -> Job:
    workers = chance.choice([0, 1, 1, 2])
    if chance.random() < 0.5:
        arguments = ["capture", *things.arguments(cache=folder / "cache", cache__num_workers=workers)]
        return Job(
            "teacher-cache",
            arguments,
            arguments,
            lambda: difference(cache_files(folder / "cache"), things.whole_cache, what="the cache"),
        )
    runs = folder / "runs"
    arguments = ["run", *things.arguments(cache=things.cache, runs=runs, run__num_workers=workers)]
    return Job(
        "train-student",
        arguments,
        [*arguments, "--resume"],
        lambda: difference(run_content(runs / RUN), things.whole_runs[1], what="the run"),
    )


def narrow_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    return (_under_a_limit, _on_a_small_disk, _with_little_shared_memory)[number % 3](things, chance, folder)


def _under_a_limit(things: Materials, chance: random.Random, folder: Path) -> Result:
    """Of the kernel's for one process."""
    job = _job(things, folder, chance)
    kind, number = chance.choice(
        [
            ("descriptors", chance.randint(12, 90)),
            ("descriptors", chance.randint(12, 90)),
            ("MiB of memory more", chance.randint(1, 900)),
            ("bytes of a file", chance.randint(1_000, 400_000)),
        ]
    )

    def limit() -> None:
        if kind == "descriptors":
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
        elif kind == "bytes of a file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        else:
            limit_memory(number << 20)

    return _short_then_enough(job, f"{number} {kind}", limit)


def _short_then_enough(
    job: Job, what: str, limit: Callable[[], None], enough: Callable[[], None] = lambda: None
) -> Result:
    ended = run(job.program, job.arguments, before=limit, limit_s=LIMIT_S)
    first = judge(ended, f"{job.program} {job.arguments[0]}: {what}", is_right=job.fault)
    left = clear_left_behind()
    if left:
        return Result(Outcome.HUNG, f"{first.what}: processes left", ended.said)
    if first.outcome is not Outcome.REFUSED:
        return first
    enough()
    ended = run(job.program, job.again, limit_s=LIMIT_S)
    second = judge(ended, f"{first.what}, then enough", is_right=job.fault)
    if second.outcome is Outcome.REFUSED:
        return Result(Outcome.LOST, second.what, f"{first.said}\n{second.said}")
    return first if second.outcome is Outcome.RIGHT else second


def _on_a_small_disk(things: Materials, chance: random.Random, folder: Path) -> Result:
    disk = folder / "disk"
    disk.mkdir()
    size_kib = chance.choice([chance.randint(20, 400), chance.randint(400, 6000)])
    job = _job(things, disk, chance)
    return _in_a_namespace(
        disk,
        size_kib,
        lambda: _short_then_enough(job, f"a disk of {size_kib} KiB", lambda: None, lambda: _resize(disk)),
        folder,
    )


def _with_little_shared_memory(things: Materials, chance: random.Random, folder: Path) -> Result:
    size_kib = chance.choice([0, 4, 8, 16, 64, 256, 1024])
    job = _job(things, folder, chance)
    what = f"{size_kib} KiB of /dev/shm"

    def work() -> Result:
        if size_kib == 0:
            Path("/dev/shm/full").write_bytes(b"x" * 4096)
        return _short_then_enough(job, what, lambda: None, lambda: _resize(Path("/dev/shm")))

    return _in_a_namespace(Path("/dev/shm"), max(size_kib, 4), work, folder)


def _in_a_namespace(place: Path, size_kib: int, work: Callable[[], Result], folder: Path) -> Result:
    """What ``work`` returns where a file system of that size lies at that place."""
    outcome = folder / "outcome"

    def inside() -> int:
        _mount(place, size_kib)
        outcome.write_bytes(pickle.dumps(work()))
        return 0

    ended = spawn(inside).end_within(3 * LIMIT_S)
    if ended.status == 77:
        raise CannotRunError("file systems cannot be mounted here")
    if not outcome.exists():
        return Result(Outcome.HUNG if ended.status is None else Outcome.WRONG, "in a namespace", ended.said)
    return pickle.loads(outcome.read_bytes())


def _mount(place: Path, size_kib: int) -> None:
    """In a namespace of this process's own; ends it with status 77 where that is not allowed."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_MOUNTS) and library.unshare(NEW_USERS | NEW_MOUNTS):
        os._exit(77)
    subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,nr_inodes=2000", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        os._exit(77)


def _resize(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=512m", str(place)], check=True, capture_output=True)
