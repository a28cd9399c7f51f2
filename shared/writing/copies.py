"""Ranks that hold one copy of a model together, and so write the same answers: the first of them decides.

copy = Copy(group)                   # or Copy() for a rank that has a model of its own
place = copy.told(lambda: store.add("claimed", 1) - 1)
halt = Halt(copy, stop)
answer(model, ..., choose=[..., Agreed(copy, stop, halt)], stop=halt)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from shared.stopping import StopRequest

Value = TypeVar("Value")


@dataclass(frozen=True)
class Copy:
    """group  of the ranks that share a copy, which do everything at the same time; None: of this rank alone"""

    group: dist.ProcessGroup | None = None

    @property
    def is_shared(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1

    @property
    def is_leader(self) -> bool:
        return not self.is_shared or dist.get_rank(self.group) == 0

    def told(self, value: Callable[[], Value]) -> Value:
        """The leader's value, on all ranks of the copy."""
        if not self.is_shared:
            return value()
        said: list[Value | None] = [value() if self.is_leader else None]
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]  # type: ignore[return-value]  # None only where the leader said so


class Halt(StoppingCriteria):
    """Ends all answers of a batch at once when the process is asked to stop; of a shared copy, the leader's."""

    def __init__(self, copy: Copy, stop: StopRequest) -> None:
        self._copy, self._stop = copy, stop
        self.agreed = False  # set by ``Agreed``, with a token

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: object) -> Tensor:
        is_over = self.agreed if self._copy.is_shared else self._stop.received
        return torch.full((len(input_ids),), is_over, dtype=torch.bool, device=input_ids.device)


class Agreed(LogitsProcessor):
    """Every rank of a copy takes the token that the leader takes: rounding may differ between devices."""

    def __init__(self, copy: Copy, stop: StopRequest, halt: Halt) -> None:
        self._copy, self._stop, self._halt = copy, stop, halt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.cat([scores.argmax(-1), scores.new_tensor([self._stop.received]).long()])
        dist.broadcast(said, group=self._copy.group, group_src=0)
        self._halt.agreed = bool(said[-1])
        return torch.full_like(scores, -torch.inf).scatter_(1, said[:-1, None], 0.0)
