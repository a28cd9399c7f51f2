"""A fork whose threads begin together finds a thread pool of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORKS = """
import os, threading
import torch
from tests.forks import settle_thread_pools

settle_thread_pools()
torch.set_num_threads(4)
weights = torch.ones(90_000)
weights.to(torch.bfloat16)  # the parent has a pool


def convert(all_here, errors):
    all_here.wait()
    try:
        weights.to(torch.bfloat16)
    except RuntimeError as error:
        errors.append(error)


def status():
    all_here, errors = threading.Barrier(8), []
    threads = [threading.Thread(target=convert, args=(all_here, errors)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(errors)


for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(status())
    assert os.waitpid(child, 0)[1] == 0
"""


def test_threads_of_a_fork_may_begin_together() -> None:
    """Nine of ten forks failed here.  In a process of its own, whose threads may work."""
    subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=Path(__file__).parents[1],
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
