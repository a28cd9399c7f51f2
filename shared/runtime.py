"""The process group, the device, the signals and the facts of one process of a stage.

    with distributed() as world:      # under torchrun, or alone: then a group of one
        ...

A world of one also has a process group, so that there is one code path for any number of ranks.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from shared.errors import RecipeError, TeachonceError
from shared.library_output import quiet_libraries

Value = TypeVar("Value")
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL: stopped by SIGTERM after saving; the same command goes on from there


@dataclass(frozen=True)
class World:
    """This process's place among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @cached_property
    def background_group(self) -> dist.ProcessGroup:
        """For collectives of a background thread, which must not mix with the main one's.

        Made at its first use, which must be the same moment of the program on all ranks.
        """
        return dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def release_memory(self) -> None:
        """Gives back what nothing holds any more; sharded modules lie in circles, which only this finds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def distributed(*, device: str | None = None) -> Iterator[World]:
    """Joins the group that torchrun describes in the environment, or makes a group of one.

    device  'cpu' or 'cuda'; by default CUDA where there is one.
    """
    wanted = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found. "
                "Start at most that many processes (NPROC)"
            )
        wanted = torch.device("cuda", local_rank)
        torch.cuda.set_device(wanted)
    backend = "cpu:gloo,cuda:nccl" if wanted.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    quiet_libraries()
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, wanted)
    try:
        yield world
        # Sharded modules must be gone before the group is, or one interpreter exit in six aborts.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def done_once(work: Callable[[], Value], world: World) -> Value:
    """What the first rank's ``work`` returns, or the error that it raises, on all ranks; called by all."""
    done: list[tuple[Value | None, TeachonceError | None]] = [(None, None)]
    if world.is_main:
        try:
            done = [(work(), None)]
        except TeachonceError as caught:
            done = [(None, caught)]
    dist.broadcast_object_list(done, src=0)
    value, error = done[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


@dataclass
class StopRequest:
    """Whether the process has been asked to stop; false until SIGTERM arrives."""

    received: bool = field(default=False)

    def agreed(self, world: World) -> bool:
        """Whether any rank has been asked: the same answer on all ranks, which must all call this."""
        if world.size == 1:
            return self.received
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """The first SIGTERM asks for an orderly stop, the second ends the process at once."""
    request = StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        request.received = True

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, previous)


def environment() -> dict[str, str | None]:
    """Versions, commit and machine kind, to be written beside every output."""
    names = ["torch", "transformers", "datasets", "pyarrow", "zstandard", "pillow", "teachonce"]
    facts: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    facts["commit"] = _commit()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` for changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
