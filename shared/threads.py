"""How many CPU threads a process computes with: set where every command starts, and by whoever starts several.

    set_threads()                     # in shared.cli.run: its share of the cores, unless the user has said otherwise
    share_cores(environment, 4)       # for four processes that are about to be started with that environment

OMP_NUM_THREADS is the user's word: where somebody has set it, it stands.  What is set here says so in a second
variable, so that processes which are started later can get another share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
OURS = "TEACHONCE_THREADS"  # the same number, where it is of this module
CGROUPS = Path("/sys/fs/cgroup")


def threads_per_process(num_processes: int = 1) -> int:
    """Cores divided by processes, each with one data-loader worker beside it.

    A thread too many is worse than one too few: OpenMP's threads spin while they wait, and where they spin
    against a worker, a training step took ten times as long (two cores: 0.29 to 3.2 s).
    """
    return max(1, num_cores() // num_processes - 1)


def num_cores() -> int:
    """Cores that this process may use, which a scheduler or a container may have made fewer than there are."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores(CGROUPS)
    return there if quota is None else min(there, quota)


def quota_cores(cgroups: Path) -> int | None:
    """Cores whose time a container may use, rounded up (docker --cpus, a limit of Kubernetes); None: all.

    A container sees its own group as the root.  Affinity says nothing of it: all threads are halted together.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2, and 1
        try:
            quota, period = map(int, " ".join((cgroups / name).read_text() for name in names).split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            return -(-quota // period)
    return None


def share_cores(environment: MutableMapping[str, str], num_processes: int) -> None:
    """Tells the processes that will start with ``environment``; a number that the user set stands."""
    if environment.get(VARIABLE) in (None, environment.get(OURS)):
        environment[VARIABLE] = environment[OURS] = str(threads_per_process(num_processes))


def set_threads() -> None:
    """For this process and its peers on this machine, as torchrun counts them.

    Libraries read the variable when they are imported, which commands do when they are at work; one that is there
    already is told.
    """
    share_cores(os.environ, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "torch" in sys.modules and VARIABLE in os.environ and os.environ[VARIABLE] == os.environ.get(OURS):
        sys.modules["torch"].set_num_threads(int(os.environ[VARIABLE]))
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else they warn in every forked data-loader worker
