"""The order of an epoch, one place at a time, against a sort of all examples.

    python -m tests.benchmarks.bench_order [--examples 100000000]

Goes through a whole epoch, counts that every example comes once, and looks at far places of a larger one.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from shared.permutation import Permutation, stream
from tests.benchmarks.tables import FIGURES, Bench, figure

BLOCK = 1 << 16
GLOBAL_BATCH_SIZE = 16
NUM_STEPS = 1000


def seconds_of_an_epoch(num_examples: int) -> tuple[float, int]:
    """Seconds for all places, a block at a time; and how many examples came."""
    order = Permutation(num_examples, key=stream(42, 0))
    came = np.zeros(num_examples, dtype=bool)
    begin = time.perf_counter()
    for first in range(0, num_examples, BLOCK):
        came[order[np.arange(first, min(first + BLOCK, num_examples))]] = True
    return time.perf_counter() - begin, int(came.sum())


def microseconds_of_a_step(num_examples: int) -> float:
    """Of a step's examples, at places spread over the epoch."""
    order = Permutation(num_examples, key=stream(42, 0))
    begin = time.perf_counter()
    for step in range(NUM_STEPS):
        place = step * (num_examples - GLOBAL_BATCH_SIZE) // NUM_STEPS
        order[np.arange(place, place + GLOBAL_BATCH_SIZE)]
    return (time.perf_counter() - begin) / NUM_STEPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="The order of an epoch")
    parser.add_argument("--examples", type=int, default=100_000_000)
    num_examples = parser.parse_args().examples
    bench = Bench("order")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, came = seconds_of_an_epoch(num_examples)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - num_examples / 2**20
    each = f" ({seconds / num_examples * 1e9:.0f} ns each)"
    rows = [
        figure("examples that came", came, ",d"),
        figure("all steps of the epoch", seconds, ".1f", unit=" s", more=each),
        figure("memory beside the count of what came", grown, ".1f", unit=" MiB"),
    ]
    begin = time.perf_counter()
    hashes = np.random.default_rng(0).integers(0, 2**63, size=num_examples)
    np.argsort(hashes, kind="stable")
    rows += [
        figure("a sort of as many", time.perf_counter() - begin, ".1f", unit=" s"),
        figure("its memory", 2 * hashes.nbytes / 2**20, ",.0f", unit=" MiB"),
    ]
    for size in (num_examples, 10**10, 10**15):
        name = f"the {GLOBAL_BATCH_SIZE} examples of a step, of {size:,}"
        rows.append(figure(name, microseconds_of_a_step(size), ".0f", unit=" us"))
    bench.show("order", f"The order of an epoch of {num_examples:,} examples", FIGURES, rows)


if __name__ == "__main__":
    main()
