"""Ranks that step together, because each forward of a sharded teacher needs all of them.

lockstep.join()      before each forward of one's own
lockstep.finish()    when there is nothing more to do: forwards on behalf of the others, until all are here
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


class Lockstep:
    """Keeps the ranks' forwards in step; does nothing where the teacher is whole on every rank.

    idle  a forward whose result nobody needs
    """

    def __init__(self, idle: Callable[[], object], *, is_needed: bool) -> None:
        self._idle = idle
        self._is_needed = is_needed

    def join(self) -> None:
        if self._is_needed:
            _num_working(working=True)

    def finish(self) -> None:
        while self._is_needed and _num_working(working=False):
            self._idle()


def _num_working(*, working: bool) -> int:
    number = torch.tensor(int(working))
    dist.all_reduce(number)
    return int(number.item())
