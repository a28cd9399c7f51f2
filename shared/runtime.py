"""The process group, the device and the facts of one process of a stage.

    with distributed() as world:      # under torchrun, or alone: then a group of one
        ...

A world of one also has a process group, so that there is one code path for any number of ranks.

Ranks wait for each other in two ways.  In a collective all take part at nearly the same time, and one that is late
by ``collective_timeout_s`` is taken to hang: the job ends.  What one rank does alone (its part of the data, reading
weights, an export) may take hours: before the next collective the others wait for it in ``World.barrier``, which has
no limit but notices a rank that dies.  A capture needs no collectives once it is planned: its ranks ``part``.
"""

from __future__ import annotations

import _thread
import gc
import importlib.metadata
import itertools
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from shared.errors import LOST_CONNECTION, NEVER_CAME, RecipeError, TeachonceError, TrainingError, shortened
from shared.library_output import quiet_libraries

COLLECTIVE_TIMEOUT_S = 600.0
NO_LIMIT = timedelta(days=14)  # some of gloo's waits count milliseconds in 31 bits, which end at 24 days
POLL_S = 0.02
GLOO_THREADS = 4  # that a group of gloo starts, at most
WAITING = "waiting"  # the group of those that wait for each other
_meetings, _queues = itertools.count(), itertools.count()
CANNOT_LISTEN = "failed to listen"
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process

Value = TypeVar("Value")


class Queue:
    """Numbers that the ranks take one after another: a slow one takes fewer."""

    def __init__(self, total: int, store: Store | None) -> None:
        self._total, self._store, self._next = total, store, 0

    def __iter__(self) -> Iterator[int]:
        while (number := self._add(1) - 1) < self._total:
            yield number

    def num_taken(self) -> int:
        """By all ranks; more than there are, once they have found none left."""
        return self._add(0)

    def give_up(self) -> None:
        """No rank finds another number."""
        self._add(self._total)

    def _add(self, number: int) -> int:
        if self._store is not None:
            return int(self._store.add("next", number))
        self._next += number
        return self._next


@dataclass(frozen=True)
class World:
    """This process's place among its peers.

    tensor  so many neighbouring ranks hold the parts of one copy of the model: they read the same rows, and are one
            data rank together
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
    tensor: int = 1
    _groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    def with_tensor(self, tensor: int) -> World:
        """The same place, where so many ranks read the same rows; they divide the number of ranks."""
        assert self.size % tensor == 0
        return replace(self, tensor=tensor)

    @property
    def data_rank(self) -> int:
        """Which rows this rank reads: ranks of one data rank read the same."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which one of its data rank's."""
        return self.rank % self.tensor

    @property
    def num_data_ranks(self) -> int:
        return self.size // self.tensor

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum over data ranks, in place and on all ranks; ranks of one data rank bring the same values."""
        if self.tensor_rank:
            values.zero_()  # what the first of them says counts
        dist.all_reduce(values)
        return values

    @property
    def background_group(self) -> dist.ProcessGroup:
        """For collectives of a background thread, which must not mix with the main one's; it waits for disks.

        Made at its first use, which must be the same moment of the program on all ranks.
        """
        return self._group_without_limit("background")

    @property
    def _waiting_group(self) -> dist.ProcessGroup:
        return self._group_without_limit(WAITING)

    def _group_without_limit(self, name: str) -> dist.ProcessGroup:
        """Its collectives wait for ever; its making does not, as a rank may die before the others have reached it."""
        if name not in self._groups:
            _require_threads()
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.collective_timeout_s))
            dist.distributed_c10d._set_pg_timeout(NO_LIMIT, group)
            self._groups[name] = group
        return self._groups[name]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when all ranks are here, however long one of them takes.

        Raises   RuntimeError  when one of them has died
        """
        if self.size == 1:
            return
        arrived = dist.barrier(group=self._waiting_group, async_op=True)
        while not arrived.is_completed():  # a wait inside torch would not let a second signal end the process
            time.sleep(POLL_S)
        arrived.wait()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; called by all, which need not come at the same time."""
        if self.size == 1:
            return flag
        self.barrier()
        said = torch.tensor(int(flag))
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def by_main(self, work: Callable[[], Value]) -> Value:
        """What ``work`` returns on the first rank, on all ranks, which wait for it however long it takes.

        Raises   TeachonceError  the first rank's own, on all ranks
        """
        if self.size == 1:
            return work()
        outcome: list[tuple[Value | None, TeachonceError | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(work(), None)]
            except TeachonceError as refusal:
                outcome = [(None, refusal)]
        self.barrier()
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # None only where work returned it

    def by_all(self, work: Callable[[], Value]) -> list[Value]:
        """What ``work`` returns on each rank, on all ranks, which wait for each other however long one takes.

        Raises   TeachonceError  of the first rank that has one, on all ranks
        """
        if self.size == 1:
            return [work()]
        own: tuple[Value | None, TeachonceError | None]
        try:
            own = (work(), None)
        except TeachonceError as refusal:
            own = (None, refusal.with_traceback(None))
        self.barrier()
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own)
        for _, error in gathered:
            if error is not None:
                raise error
        return [value for value, _ in gathered]

    def queue(self, total: int) -> Queue:
        """The numbers below ``total``, each for one rank; all ranks call this, in the same order of calls."""
        if self.size == 1:  # which counts for nothing: the others may not have one
            return Queue(total, None)
        return Queue(total, PrefixStore(f"queue/{next(_queues)}", _get_default_store()))

    def meets(self, *, within_s: float) -> bool:
        """Whether all ranks come here within that time of this one; called by all.

        For what one rank may have met alone: to go on would leave the others in a collective that never ends.
        """
        store, name = PrefixStore("meetings", _get_default_store()), str(next(_meetings))
        deadline = time.monotonic() + within_s
        here = store.add(name, 1)
        while here < self.size and time.monotonic() < deadline:
            time.sleep(POLL_S)
            here = store.add(name, 0)
        return bool(here >= self.size)

    def part(self, *, from_all_but: dist.ProcessGroup | None = None) -> None:
        """From here on no rank waits for the others, and the loss of one does not end them; called by all.

        from_all_but  a group of this rank and some others that go on together: ``barrier`` is theirs; its collectives
                      run on the CPU and wait without limit
        """
        if self.size == 1:
            return
        self.barrier()
        self.forget_groups()
        if from_all_but is None:
            dist.destroy_process_group()
        else:
            self._groups[WAITING] = from_all_but

    def forget_groups(self) -> None:
        """Lets groups end where their threads are: a forked process that collects one waits for these for ever."""
        self._groups.clear()

    def release_memory(self) -> None:
        """Gives back what nothing holds any more; sharded modules lie in circles, which only this finds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def alone() -> World:
    """The place of a process without peers, and without a process group."""
    return World(0, 1, 0, torch.device("cpu"))


def default_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def distributed(
    *, device: str | None = None, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> Iterator[World]:
    """Joins the group that torchrun describes in the environment, or makes a group of one.

    device                'cpu' or 'cuda'; by default CUDA where there is one
    collective_timeout_s  how long a rank may be late for a collective

    Raises   TrainingError  when one is later, or has died
    """
    wanted = torch.device(device) if device else default_device()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found. "
                "Start at most that many processes (NPROC)"
            )
        wanted = torch.device("cuda", local_rank)
        torch.cuda.set_device(wanted)
    with _explaining(collective_timeout_s):
        _join(wanted, timedelta(seconds=collective_timeout_s))
        quiet_libraries()
        world = World(dist.get_rank(), dist.get_world_size(), local_rank, wanted, collective_timeout_s)
        try:
            if world.size > 1:
                world._waiting_group  # noqa: B018  # made here, where all ranks are
            yield world
            # Sharded modules must be gone before the group is, or one interpreter exit in six aborts.
            gc.collect()
            if dist.is_initialized():  # else the ranks have parted
                world.barrier()
        finally:
            world.forget_groups()
            if dist.is_initialized():
                dist.destroy_process_group()


def _require_threads() -> None:
    """Raises   RuntimeError  where the system gives no more threads: gloo ends the process then, without a word"""
    may_end = threading.Event()
    try:
        for _ in range(GLOO_THREADS):
            _thread.start_new_thread(may_end.wait, ())  # a Thread waits for one that ended for want of memory
    finally:
        may_end.set()


def _join(device: torch.device, limit: timedelta) -> None:
    _require_threads()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend, timeout=limit)
    except (ValueError, dist.DistNetworkError) as error:  # a variable, or the place that they name
        if not isinstance(error, ValueError) and CANNOT_LISTEN not in str(error):
            raise
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in PLACE)
        raise RecipeError(
            f"this process cannot meet the others of its job ({found}): {shortened(str(error))}. Start it with "
            "torchrun, on another --master-port where this one is taken; alone, it needs none of these variables"
        ) from error


@contextmanager
def _explaining(collective_timeout_s: float) -> Iterator[None]:
    """Raises   TrainingError  for what gloo, NCCL and their store mean by their words about other ranks"""
    try:
        yield
    except RuntimeError as error:
        explained = _explained(error, collective_timeout_s)
        if explained is None:
            raise
        raise explained from error


def _explained(error: RuntimeError, collective_timeout_s: float) -> TrainingError | None:
    """None for errors that are not about other ranks."""
    text = str(error)
    if any(words in text for words in NEVER_CAME):
        return TrainingError(
            f"another process of this job did not come within {collective_timeout_s:g} s "
            "(parallel.collective_timeout_s): it has ended, or cannot be reached. Its own output says more"
        )
    if "Timed out waiting" in text or ("timed out" in text.lower() and "collective" in text.lower()):
        return TrainingError(
            f"another process of this job was late for a collective by more than {collective_timeout_s:g} s "
            "(parallel.collective_timeout_s). Raise the limit if it was at work; else its own output says more"
        )
    return lost_peer(text)


def lost_peer(text: str) -> TrainingError | None:
    """The error of a process that has lost another one, where that is what the text says."""
    if any(words in text for words in LOST_CONNECTION):
        return TrainingError("another process of this job has ended; its own message says why")
    return None


def environment() -> dict[str, str | None]:
    """Versions, commit and machine kind, to be written beside every output."""
    names = ["transformers", "datasets", "pyarrow", "zstandard", "pillow", "teachonce"]
    facts: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    facts["torch"] = str(
        torch.__version__
    )  # with the kind of build, which the package's metadata may leave out
    facts["commit"] = _commit()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` for changes; None where none tracks this file, as in an environment."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
