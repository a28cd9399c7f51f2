"""How many CPU threads a process computes with: set where every command starts, and by whoever starts several.

    set_threads()                     # in shared.cli.run: its share of the cores, unless the user has said otherwise
    share_cores(environment, 4)       # for four processes that are about to be started with that environment

OMP_NUM_THREADS is the user's word; nothing here changes one that is there.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "OMP_NUM_THREADS"


def threads_per_process(num_processes: int = 1) -> int:
    """Cores divided by processes, each with one data-loader worker beside it.

    A thread too many is worse than one too few: OpenMP's threads spin while they wait, and where they spin
    against a worker, a training step took ten times as long (two cores: 0.29 to 3.2 s).
    """
    return max(1, num_cores() // num_processes - 1)


def num_cores() -> int:
    """Cores that this process may use, which a scheduler or a container may have made fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(environment: MutableMapping[str, str], num_processes: int) -> None:
    """Tells the processes that will start with ``environment``."""
    environment.setdefault(VARIABLE, str(threads_per_process(num_processes)))


def set_threads() -> None:
    """For this process and its peers on this machine, as torchrun counts them.

    Not by the variable: the libraries have read it when they were imported, and what this process starts later
    has other shares.
    """
    if VARIABLE not in os.environ:
        import torch

        torch.set_num_threads(threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else they warn in every forked data-loader worker
