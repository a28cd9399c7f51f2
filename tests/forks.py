"""What a process that was forked from one with torch in it must do first."""

from __future__ import annotations

import os

import torch


def settle_thread_pools() -> None:
    """Has every fork of this process make its own thread pool while it has one thread only.

    PyTorch replaces the pool of the parent in the first parallel region of a fork, without a lock.  Two threads that
    come there together, as those that load a model's weights do, fail with "Invalid thread pool!".
    """
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
