"""What the parts of ``bench_gpu`` measure with: figures with their goals, and a device's clock and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

GIB = 2**30
ROUNDS = 7
WARM_UP = 2  # rounds that do not count
MODULE_OF_FLA = "fla"  # of the package flash-linear-attention


@dataclass(frozen=True)
class Figure:
    """One number.  ``goal`` is the most that it should be, where there is one."""

    name: str
    value: float
    unit: str
    goal: float | None = None

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"{self.goal:g} {self.unit}".strip()
        missed = " **missed**" if self.goal is not None and not self.value <= self.goal else ""
        return f"| {self.name} | {self.value:.4g} {self.unit}".rstrip() + f" | {goal}{missed} |"


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call; on a GPU between two events of its stream."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def taking_turns(
    variants: Sequence[Callable[[], object]], device: torch.device, *, rounds: int = ROUNDS
) -> list[float]:
    """Median milliseconds of each variant."""
    columns: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds + WARM_UP):
        for variant, column in zip(variants, columns, strict=True):
            column.append(milliseconds(variant, device))
    return [statistics.median(column[WARM_UP:]) for column in columns]


def peak_gib(function: Callable[[], object]) -> float:
    """Of a GPU's memory, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB
