"""Ranks that share one copy of the teacher: the first of them leads, the others compute what it asks for.

    followers.ask("hidden", tensors)          # the leader, before its own part
    for name, tensors in followers.asked():   # the others, until the leader dismisses them
        ...
    followers.dismiss(0)

The leader alone reads examples, draws targets and writes; so a unit does not depend on how many ranks share a copy in
any other way than by rounding.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shared.runtime import NO_LIMIT, World

POLL_S = 0.001
DISMISSED = "dismissed"
Header = tuple[str, list[tuple[str, torch.Size, torch.dtype]]]


@dataclass(frozen=True)
class Followers:
    """The ranks of one copy, as each of them sees the others.

    group  of the device; headers go over ``waiting``, which has no limit: a leader may wait for disks
    """

    group: dist.ProcessGroup
    waiting: dist.ProcessGroup
    device: torch.device

    @classmethod
    def of(cls, group: dist.ProcessGroup, world: World) -> Followers:
        """Called by all ranks of the job, each with the group of its copy."""
        mine = dist.get_process_group_ranks(group)
        copies = [range(start, start + len(mine)) for start in range(0, world.size, len(mine))]
        waiting = [dist.new_group(list(copy), backend="gloo", timeout=NO_LIMIT) for copy in copies]
        return cls(group, waiting[mine[0] // len(mine)], world.device)

    @property
    def is_leader(self) -> bool:
        return dist.get_rank(self.group) == 0

    def ask(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Tells the others what is to be computed, of which tensors; they lie on the leader's device."""
        self._send((name, [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]))
        for tensor in tensors.values():
            dist.broadcast(tensor.contiguous(), group=self.group, group_src=0)

    def dismiss(self, status: int) -> None:
        """There is nothing more to be asked; all ranks of the copy end with this status."""
        self.ask(DISMISSED, {"status": torch.tensor([status], device=self.device)})

    def sum(self, value: float) -> float:
        """Over the ranks of the copy, on the leader, which has asked the others to call it too."""
        total = torch.tensor(value, dtype=torch.float64)
        self._wait_for(dist.reduce(total, group=self.waiting, group_dst=0, async_op=True))
        return float(total)

    def asked(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the leader asks, one after the other; the last is to end."""
        while True:
            name, kinds = self._receive()
            tensors = {
                key: torch.empty(shape, dtype=dtype, device=self.device) for key, shape, dtype in kinds
            }
            for tensor in tensors.values():
                dist.broadcast(tensor, group=self.group, group_src=0)
            yield name, tensors

    def _send(self, header: Header) -> None:
        content = torch.frombuffer(bytearray(pickle.dumps(header)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(content)]))
        self._broadcast(content)

    def _receive(self) -> Header:
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        content = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(content)
        header: Header = pickle.loads(content.numpy().tobytes())
        return header

    def _broadcast(self, tensor: Tensor) -> None:
        self._wait_for(dist.broadcast(tensor, group=self.waiting, group_src=0, async_op=True))

    def _wait_for(self, sent: dist.Work) -> None:
        """A wait inside torch would not let a second signal end the process."""
        while not sent.is_completed():
            time.sleep(POLL_S)
        sent.wait()
