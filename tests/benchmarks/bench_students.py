"""The same student taught in many ways: labels alone, a live teacher, caches of several policies and sizes.

    python -m tests.benchmarks.bench_students [--recipes phantom medpix_sample] [--seeds 0 1 2] [--tails ghost ...]

Every variant has the same student, the same order of examples and the same number of steps; a seed changes the
order and the cache's draws.  Two lengths, of about the same number of steps: one epoch over all rows, and twenty
over the first 240.  ``top_k`` and ``random`` get the largest caches that are not above the default and 1/64 in size.
What counts is measured against the teacher's *whole* distributions on held-out rows.

Every run is a process of its own, on one thread.  Steps are timed apart: all variants take turns in one process, step
by step.  What is done is kept in work/benchmarks/students.jsonl, turns in students.turns.jsonl until all are there.
It is not done again while recipe and teacher are the same: delete both files to begin anew.  A run that fails is
named at the end; the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from shared import codec
from shared.data.processing import Encoded, open_processor
from shared.recipes import Recipe, load_recipe
from shared.recipes.policies import TAIL_MODES, Policy, Random, Threshold, TopK
from shared.runtime import World, distributed
from shared.sparse import position_seeds, sparsify
from stage1_teacher.capturing.teacher import load_teacher
from stage2_student.training.inputs import open_inputs
from tests.benchmarks.peers.live import LiveTeacher
from tests.benchmarks.student_results import (
    COSTS,
    FOLDER,
    LABELS,
    LENGTHS,
    LIVE,
    RESULTS,
    TIMED,
    Results,
    learned,
)
from tests.benchmarks.student_runs import (
    Job,
    Key,
    Teaching,
    fingerprint,
    require_all,
    run_missing,
    time_missing,
)
from tests.benchmarks.tables import Bench

TAUS = (512, 2048, 64, 16)  # the default first
SIZE_SAMPLE = 256  # examples by which equal sizes are found
SAMPLE_BYTES = 2**31  # of their whole distributions in fp32, at most


def prepare(name: str) -> Recipe:
    """Data, models, a trained teacher and its default cache, all as ``make teacher-cache`` makes them."""
    command = [sys.executable, "-m", "shared.pipeline", "teacher-cache", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_recipe(name)


def policies_of_equal_size(
    recipe: Recipe,
    world: World,
    *,
    taus: Sequence[int] = TAUS,
    others_at: Sequence[int] | None = None,
    num_examples: int = SIZE_SAMPLE,
    most: int = 65535,
) -> tuple[dict[str, Policy], dict[str, str]]:
    """Thresholds, and the other policies at the bytes a position of some of them.

    others_at  those thresholds; None: the first, and 1/64
    most       ids or draws a position
    Returns    the policies, and of the others which threshold's bytes they have at most
    """
    processor = open_processor(recipe.student.model, recipe.data)
    assert recipe.teacher is not None
    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
    train = open_inputs(recipe, world).train
    rows = train.rows[drawn(train.num_examples, num_examples)]
    encoded = list(
        bounded(
            (processor.encode(train.split[int(row)]) for row in rows),
            SAMPLE_BYTES // (4 * teacher.num_token_ids),
        )
    )
    with torch.inference_mode():
        logprobs = [teacher.logprobs(teacher.hidden(processor.collate([one]))).clone() for one in encoded]
    seeds = [position_seeds(0, one.key, one.num_positions) for one in encoded]

    def num_bytes(policy: Policy) -> int:
        made = (sparsify(one, policy, seeds=its) for one, its in zip(logprobs, seeds, strict=True))
        return sum(len(codec.encode(one)) for one in made)

    at_most = {}
    found: dict[str, Policy] = {f"tau 1/{tau}": Threshold(tau=1 / tau) for tau in taus}
    for tau in others_at or (taus[0], 64):
        wanted = num_bytes(Threshold(tau=1 / tau))
        k = largest_within(lambda k: num_bytes(TopK(k=k)), wanted, most=min(most, teacher.num_token_ids))
        draws = largest_within(lambda draws: num_bytes(Random(draws=draws)), wanted, most=most)
        others: dict[str, Policy] = {f"top {k}": TopK(k=k), f"random {draws}": Random(draws=draws)}
        found |= others
        at_most |= dict.fromkeys(others, f"tau 1/{tau}")
    return found, at_most


def drawn(num_examples: int, number: int) -> np.ndarray:
    """So many places, at random: examples may lie in a rhythm, as the questions about one picture do."""
    return np.random.default_rng(0).permutation(num_examples)[:number]


def bounded(examples: Iterable[Encoded], max_positions: int) -> Iterator[Encoded]:
    """The first of them, with at most so many positions together, and always one."""
    num_positions = 0
    for place, one in enumerate(examples):
        num_positions += one.num_positions
        if place and num_positions > max_positions:
            return
        yield one


def largest_within(size: Callable[[int], int], wanted: int, *, most: int) -> int:
    """The largest number from 1 to ``most`` whose size is at most ``wanted``, 1 if none is; sizes rise with it."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle - 1)
    return low


def run_all(
    name: str, *, seeds: list[int], kd_ratio: float, lengths: list[str], tails: list[str] | None
) -> tuple[list[Key], dict[str, str]]:
    """The runs of one recipe that are not done yet, seed by seed, so that variants take turns.

    Returns  those that failed, and which variants were made to have at most which one's bytes

    tails  top_k with each of these and nothing else; None: all variants
    """
    recipe = prepare(name)
    with distributed(device="cpu") as world:
        policies, at_most = policies_of_equal_size(recipe, world)
    variants: dict[str, Teaching] = {LABELS: None, LIVE: LiveTeacher()} | policies
    jobs = [
        Job(name, variant, length, seed, kd_ratio, teaching)
        for seed in seeds
        for length in lengths
        for variant, teaching in variants.items()
    ]
    if tails is not None:
        with_tails = [one for job in jobs if isinstance(job.policy, TopK) for one in of_tails(job, tails)]
        return run_missing(with_tails), at_most
    failed = run_missing(jobs)
    timed = timed_jobs(name, variants, seeds=seeds, kd_ratio=kd_ratio)
    return failed + time_missing(timed, but=failed), at_most


def of_tails(job: Job, tails: list[str]) -> list[Job]:
    return [replace(job, variant=f"{job.variant}, {tail}", tail=tail) for tail in tails]


def timed_jobs(name: str, variants: dict[str, Teaching], *, seeds: list[int], kd_ratio: float) -> list[Job]:
    """With one seed, as a step's time hardly depends on it."""
    return [Job(name, variant, TIMED, seeds[0], kd_ratio, teaching) for variant, teaching in variants.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    parser.add_argument(
        "--tails", nargs="+", choices=TAIL_MODES, help="top_k with each of these, nothing else"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    bench = Bench("students", goes_on=RESULTS.exists())
    failed: list[Key] = []
    for name in arguments.recipes:
        if name == "medpix_sample" and not Path(load_recipe(name).data.source).exists():
            print(f"{name}: its records are not here, left out")
            continue
        its_failed, at_most = run_all(
            name,
            seeds=arguments.seeds,
            kd_ratio=arguments.kd_ratio,
            lengths=arguments.lengths,
            tails=arguments.tails,
        )
        failed += its_failed
        found = Results(name, arguments.kd_ratio, fingerprint=fingerprint(name))
        table = f"students-{name}-{arguments.kd_ratio:g}"
        about = f"`{name}`, `kd_ratio: {arguments.kd_ratio:g}`"
        notes = found.notes(at_most)
        title, costs = f"What students learned, {about}", f"Costs against labels alone, {about}"
        bench.show(table, title, learned(), found.table(), notes=notes, stamps=found.stamps)
        bench.show(f"{table}-costs", costs, COSTS, found.costs(), stamps=found.stamps)
    require_all(failed)


if __name__ == "__main__":
    main()
