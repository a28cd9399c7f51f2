"""What all ranks must know before they begin a step together.

A rank that meets an error alone would leave the others waiting in a collective for ever.  So each rank says
how it fares before a step, and an error of one is raised by all.

Ranks that hold the parts of one copy of the model read the same rows, each for itself; their counts count once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from shared.errors import TeachonceError, TrainingError
from shared.runtime import World
from shared.stopping import StopRequest
from stage2_student.training.feed import Microbatch


@dataclass(frozen=True)
class Step:
    """A step that all ranks are ready for; the counts are of all of them."""

    microbatches: list[Microbatch]
    wait_s: float  # that this rank waited for its data
    num_positions: int
    num_tokens: int
    num_kept: int  # positions that are trained on
    padding: float  # 0 to 1: the share of forwarded tokens that is padding
    waiting: (
        float  # 0 to 1: the share of all ranks' work that is waiting for the slowest of each round, by cost
    )
    stop: bool  # whether any rank has been asked to stop
    save: bool  # whether a checkpoint is due by the clock of any rank that looks at one


def in_agreement(
    fed: Iterator[tuple[list[Microbatch], float]],
    world: World,
    stop: StopRequest | None = None,
    *,
    is_save_due: Callable[[], bool] = lambda: False,
    on_refused: Callable[[list[str]], None] = lambda reasons: None,
) -> Iterator[Step]:
    """Called by all ranks, with feeds of the same number of steps.

    is_save_due  clocks differ, so what one rank reads from its own has to be agreed on
    on_refused   is told why rows of any rank were left out; it may raise, on all ranks alike

    Raises   TeachonceError  the error that one rank's feed met, on all ranks
             TrainingError   when ranks of one data rank have read different rows
    """
    while True:
        error: TeachonceError | None = None
        microbatches: list[Microbatch] = []
        wait_s = 0.0
        try:
            microbatches, wait_s = next(fed)
        except StopIteration:
            return
        except TeachonceError as caught:
            error = caught
        asked = stop is not None and stop.received
        costs = torch.tensor([m.cost for m in microbatches], dtype=torch.int64)
        counts = [sum(m.num_positions for m in microbatches), sum(m.num_tokens for m in microbatches)]
        counts += [sum(m.num_kept for m in microbatches)]
        counts += [sum(m.num_forwarded for m in microbatches), int(costs.sum())]
        refused = [reason for m in microbatches for reason in m.refused]
        told = [asked, is_save_due(), len(refused), error is not None, _signature(microbatches, world)]
        sums = torch.tensor([*(0 if world.tensor_rank else n for n in counts), *told], dtype=torch.int64)
        dist.all_reduce(sums)
        num_positions, num_tokens, num_kept, num_forwarded, cost, num_asked, *others = sums.tolist()
        num_due, num_refused, num_failed, odd = others
        if num_failed:
            _raise_everywhere(error, world)
        if odd:
            raise TrainingError(
                "ranks that hold the parts of one copy of the model have read different rows: one of them could not "
                "read a row, or found another one. Make the data the same for all processes; --resume then goes on"
            )
        if num_refused:
            everywhere: list[list[str]] = [[]] * world.size
            dist.all_gather_object(everywhere, refused)
            on_refused(sorted(reason for one in everywhere[:: world.tensor] for reason in one))
        dist.all_reduce(costs, dist.ReduceOp.MAX)  # of each round, now that all have as many
        slowest = int(costs.sum()) * world.num_data_ranks
        yield Step(
            microbatches,
            wait_s,
            num_positions,
            num_tokens,
            num_kept,
            padding=1 - num_tokens / max(1, num_forwarded),
            waiting=1 - cost / max(1, slowest),
            stop=num_asked > 0,
            save=num_due > 0,
        )


def _signature(microbatches: Sequence[Microbatch], world: World) -> int:
    """Adds up to zero over ranks of one data rank that have read the same rows."""
    if world.tensor == 1:
        return 0
    read = [(m.slot.examples, m.lengths, m.num_tokens, m.num_forwarded) for m in microbatches]
    signature = zlib.crc32(repr(read).encode())
    return -signature if world.tensor_rank else signature * (world.tensor - 1)


def _raise_everywhere(error: TeachonceError | None, world: World) -> NoReturn:
    errors: list[TeachonceError | None] = [None] * world.size
    dist.all_gather_object(errors, error)
    raise error or next(found for found in errors if found is not None)
