"""How far the design goes: sizes, times and rates for data sets that are not at hand, from stated inputs.

    python -m tests.benchmarks.scale            # the tables of docs/scaling.md

Arithmetic, and a simulation of how ranks claim units; nothing here is measured, but inputs that say so are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from shared.cache.segments import segment_sizes

GB = 1e9


@dataclass(frozen=True)
class Inputs:
    """What all tables are made from.

    positions           of an answer: MedPix-VQA has some 2 million in 20,500 rows
    prompt_tokens       assumed: 60 of text, 256 of a picture of 512 x 512
    index_bytes         an example; measured, docs/cache-format.md
    list_bytes          a shard; docs/cache-format.md
    manifest_bytes      without segments, and of each segment; measured on a cache of two splits
    teacher, student    parameters that a token passes
    flops               of a GPU: 40 % (assumed) of an H100's 989e12 dense bf16 (its data sheet)
    picture_bytes       assumed; MedPix-VQA's PNG files are of that order
    """

    positions: int = 100
    prompt_tokens: int = 316
    index_bytes: int = 22
    list_bytes: int = 80
    manifest_bytes: tuple[int, int] = (1700, 410)
    teacher: float = 9e9
    student: float = 4e9
    flops: float = 0.4 * 989e12
    picture_bytes: int = 100_000

    @property
    def tokens(self) -> int:
        return self.positions + self.prompt_tokens

    @property
    def capture_s(self) -> float:
        """Of one example on one GPU: a forward pass of the teacher."""
        return 2 * self.teacher * self.tokens / self.flops

    @property
    def training_s(self) -> float:
        """Of one example on one GPU: forward and backward of the student."""
        return 6 * self.student * self.tokens / self.flops


@dataclass(frozen=True)
class Scale:
    """A data set, and the settings one would choose for it.

    bytes_per_position  at that tau: 97 and 20, DESIGN's figures for a large language model's distributions
    """

    name: str
    num_examples: int
    tau: str
    bytes_per_position: float
    examples_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.examples_per_shard)

    @property
    def num_segments(self) -> int:
        return len(segment_sizes(self.num_shards))

    def cache_bytes(self, inputs: Inputs) -> float:
        return self.num_examples * inputs.positions * self.bytes_per_position

    def shard_bytes(self, inputs: Inputs) -> float:
        return self.examples_per_shard * inputs.positions * self.bytes_per_position

    def index_bytes(self, inputs: Inputs) -> int:
        return self.num_examples * inputs.index_bytes

    def list_bytes(self, inputs: Inputs) -> int:
        return self.num_shards * inputs.list_bytes

    def manifest_bytes(self, inputs: Inputs) -> int:
        fixed, segment = inputs.manifest_bytes
        return fixed + segment * self.num_segments

    def capture_hours(self, inputs: Inputs, num_gpus: int) -> float:
        return self.num_examples * inputs.capture_s / num_gpus / 3600

    def claims_per_s(self, inputs: Inputs, num_gpus: int) -> float:
        """Units that all ranks together claim."""
        return num_gpus / (self.examples_per_shard * inputs.capture_s)

    def read_bytes_per_s(self, inputs: Inputs) -> float:
        """Of one GPU that trains the student: targets alone."""
        return inputs.positions * self.bytes_per_position / inputs.training_s


SCALES = (
    Scale("20 thousand", 20_500, "1/512", 97, 512),
    Scale("10 million", 10_000_000, "1/64", 20, 512),
    Scale("10 billion", 10_000_000_000, "1/64", 20, 65_536),
)


def table(inputs: Inputs) -> list[str]:
    """Markdown: one column for each size."""
    rows: list[tuple[str, list[str]]] = [
        ("tau, bytes a position", [f"{s.tau}, {s.bytes_per_position:g}" for s in SCALES]),
        ("`examples_per_shard`", [f"{s.examples_per_shard:,}" for s in SCALES]),
        ("shards, each of", [f"{s.num_shards:,}, {size(s.shard_bytes(inputs))}" for s in SCALES]),
        ("segments", [f"{s.num_segments}" for s in SCALES]),
        ("bytes in all", [size(s.cache_bytes(inputs)) for s in SCALES]),
        ("indices, mapped by every reader", [size(s.index_bytes(inputs)) for s in SCALES]),
        ("lists, mapped too", [size(s.list_bytes(inputs)) for s in SCALES]),
        ("manifest", [size(s.manifest_bytes(inputs)) for s in SCALES]),
        ("capture on 8 GPUs", [duration(s.capture_hours(inputs, 8)) for s in SCALES]),
        ("capture on 1,024 GPUs", [duration(s.capture_hours(inputs, 1024)) for s in SCALES]),
        ("claims a second, 1,024 GPUs", [f"{s.claims_per_s(inputs, 1024):.2f}" for s in SCALES]),
        ("units a rank, 1,024 GPUs", [f"{s.num_shards / 1024:,.2f}" for s in SCALES]),
        ("targets read by a training GPU", [f"{size(s.read_bytes_per_s(inputs))}/s" for s in SCALES]),
        (
            "its pictures, for comparison",
            [f"{size(inputs.picture_bytes / inputs.training_s)}/s"] * len(SCALES),
        ),
    ]
    head = ["", *(f"{s.name} examples" for s in SCALES)]
    lines = [head, ["---"] * len(head), *([label, *cells] for label, cells in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def finish_time(num_units: int, speeds: np.ndarray) -> float:
    """When the last unit is done, by ranks that each claim the next unit when free; a unit takes 1 / speed."""
    free = [(0.0, rank) for rank in range(len(speeds))]
    heapq.heapify(free)
    last = 0.0
    for _ in range(num_units):
        begin, rank = heapq.heappop(free)
        end = begin + 1 / float(speeds[rank])
        last = max(last, end)
        heapq.heappush(free, (end, rank))
    return last


def even_time(num_units: int, speeds: np.ndarray) -> float:
    """The same where each rank has been given its share beforehand."""
    return -(-num_units // len(speeds)) / float(speeds.min())


def some_speeds(num_ranks: int, *, seed: int = 0) -> np.ndarray:
    """(num_ranks,) around one, scattered by 20 %; the last rank at half speed."""
    speeds = np.random.default_rng(seed).normal(1.0, 0.2, num_ranks).clip(0.5, 1.5)
    speeds[-1] = 0.5
    return speeds


def claims_table(num_ranks: int = 1024) -> list[str]:
    """Markdown: time beyond the ideal, in which all ranks end together."""
    speeds = some_speeds(num_ranks)
    lines = ["| units a rank | claimed | shared out beforehand |", "|---|---|---|"]
    for units in (1, 4, 16, 64, 256):
        ideal = units * num_ranks / speeds.sum()
        claimed, even = (f(units * num_ranks, speeds) / ideal - 1 for f in (finish_time, even_time))
        lines.append(f"| {units} | {claimed:+.1%} | {even:+.1%} |")
    return lines


def size(num_bytes: float) -> str:
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.3g} B"


def duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.2g} s"


def main() -> None:
    print("\n".join([*table(Inputs()), "", *claims_table()]))


if __name__ == "__main__":
    main()
