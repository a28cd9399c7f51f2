"""How evenly a step's examples are dealt to ranks: counted on the lengths of real examples, and timed on two ranks.

    python -m tests.benchmarks.bench_steps [--source ../shared/medpix-vqa] [--speed [--steps 24]]

The critical path is the costliest microbatch of each round, summed over the rounds of an epoch's steps, in tokens
with padding; the bound below it is what no dealing can beat: the longest example, or all tokens shared out evenly.
Lengths are the survey's: text at four characters a token, pictures as Qwen's processor counts them.

``--speed`` trains a small Qwen3-VL on two ranks.  The ways of dealing take turns, step by step, over the same
examples; each step's time is compared with that of the first way.  On a machine with other work, the time that the
busier rank computes says more than the time by the clock.

Of Qwen3.5's sizes it also shows what a picture costs beside its tokens, which the dealing counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from shared import dealing
from shared.capture.windows import WINDOW
from shared.data.images import size_of
from shared.data.rows import open_split
from shared.dealing import Deal, Limits, Work, critical_path, deal, padding_share
from shared.recipes import DataConfig, FreezeConfig, Recipe
from shared.recipes.files import validate_tree
from shared.runtime import World, distributed
from shared.small_models import REFERENCE_SHAPES, make_small_model, train_tokenizer
from stage2_student.training.feed import Microbatch
from stage2_student.training.freezing import freeze
from stage2_student.training.inputs import Inputs, open_inputs
from stage2_student.training.optim import make_optimizer
from stage2_student.training.order import Slot, step_examples, step_shape
from stage2_student.training.picture_costs import tokens_per_pixel
from stage2_student.training.step import train_step
from stage2_student.training.student import StudentWithLoss, build_student
from tests.benchmarks.tables import FIGURES, Bench, figure

SOURCE = "../shared/medpix-vqa"
PIXELS_PER_TOKEN = 32 * 32  # patches of 16 x 16, four of them merged
TEMPLATE_TOKENS = 30
CHARACTERS_PER_TOKEN = 4  # of English prose, roughly
BUDGET = 4096
NUM_RANKS = 2
TO_REACH = {"dealt": 1.1, "packed": 1.05}  # of the critical path against its bound
PRICES = (32, 64)  # of one more round, in tokens
SIDE = 512  # pixels of a picture


def lengths_of(source: str) -> np.ndarray:
    """(examples,) int64 of the training split; drawn, of like shape, where there is no such folder."""
    if not Path(source).exists():
        return np.exp(np.random.default_rng(0).normal(4.7, 0.3, 1200)).astype(np.int64)
    found = []
    for example in open_split(DataConfig(source=source), "train"):
        width, height = size_of(example.images[0])
        text = (len(example.question) + len(example.answer)) // CHARACTERS_PER_TOKEN
        found.append(TEMPLATE_TOKENS + text + max(1, width * height // PIXELS_PER_TOKEN))
    return np.array(found, np.int64)


def by_number(lengths: np.ndarray, num_ranks: int, size: int) -> Deal:
    """What it is compared with: by length, so many examples in each microbatch."""
    order = np.argsort(-lengths, kind="stable").tolist()
    batches = [tuple(order[begin : begin + size]) for begin in range(0, len(order), size)]
    batches += [()] * (-len(batches) % num_ranks)
    return [tuple(batches[begin : begin + num_ranks]) for begin in range(0, len(batches), num_ranks)]


def balanced(lengths: np.ndarray, num_ranks: int, *, packed: bool) -> Deal:
    return deal(Work.of(lengths, packed=packed), num_ranks=num_ranks, limits=Limits(tokens=BUDGET))


def steps(lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(lengths))
    return (lengths[order[begin : begin + batch]] for begin in range(0, len(order), batch))


def cell(deals: Sequence[Deal], parts: Sequence[np.ndarray], num_ranks: int, *, name: str = "") -> str:
    """The critical path of an epoch against its bound, bold where it misses the goal of that name; mean rounds."""
    works = [Work.of(one, packed=name == "packed") for one in parts]
    bound = sum(max(int(one.max()), one.sum() / num_ranks) for one in parts)
    share = sum(critical_path(rounds, work) for rounds, work in zip(deals, works, strict=True)) / bound
    mark = "**" if share > TO_REACH.get(name, np.inf) else ""
    return f"{mark}{share:.2f}{mark} ({np.mean([len(rounds) for rounds in deals]):.1f})"


def table(bench: Bench, lengths: np.ndarray) -> None:
    rows = []
    for batch, num_ranks in itertools.product((16, 64, 256), (1, 2, 8, 64)):
        parts = list(steps(lengths, batch))
        deals = {str(size): [by_number(one, num_ranks, size) for one in parts] for size in (1, 2, 4)}
        deals["dealt"] = [balanced(one, num_ranks, packed=False) for one in parts]
        deals["packed"] = [balanced(one, num_ranks, packed=True) for one in parts]
        cells = [cell(found, parts, num_ranks, name=name) for name, found in deals.items()]
        rows.append([f"{batch}", f"{num_ranks}", *cells])
    notes = (
        f"{len(lengths):,} examples of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} in the mean. "
        f"Critical path against its bound; the mean number of rounds of a step in brackets. A budget of {BUDGET:,} "
        f"tokens. To reach is {TO_REACH['dealt']:.2f} dealt and {TO_REACH['packed']:.2f} packed; misses are bold."
    )
    head = ("batch", "ranks", "by 1", "by 2", "by 4", "dealt", "packed")
    bench.show("steps", "How evenly a step's examples are dealt to ranks", head, rows, notes=notes)


def prices(bench: Bench, lengths: np.ndarray) -> None:
    """What dealing comes to where one more round is cheaper, or dearer."""
    shapes = ((16, 1), (16, 2), (16, 8), (64, 8))
    rows = []
    for price in PRICES:
        rows.append([f"{price} tokens"])
        with mock.patch.object(dealing, "ROUND_TOKENS", price):
            for batch, num_ranks in shapes:
                parts = list(steps(lengths, batch))
                deals = [balanced(one, num_ranks, packed=False) for one in parts]
                rows[-1].append(cell(deals, parts, num_ranks))
    head = ("price of a round", *(f"{batch} on {num_ranks}" for batch, num_ranks in shapes))
    notes = "Examples of a step on so many ranks: critical path against its bound, mean rounds in brackets."
    bench.show("steps-price", "Critical path by the price of a round", head, rows, notes=notes)


def pictures(bench: Bench) -> None:
    """Of Qwen3.5's sizes, by the weights that a patch and a token go through."""
    rows = []
    for size, shape in REFERENCE_SHAPES.items():
        with torch.device("meta"):
            model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**shape))
        rows.append([f"Qwen3.5-{size}"])
        for is_frozen in (True, False):
            freeze(model, FreezeConfig(vision=is_frozen))
            rows[-1].append(f"{tokens_per_pixel(model) * SIDE**2:.0f}")
    head = ("", "frozen tower", "trained tower")
    notes = f"Of {SIDE} x {SIDE} pixels, beside the {SIDE**2 // PIXELS_PER_TOKEN} tokens that it is there."
    title = "What a picture costs, in tokens of the language model"
    bench.show("steps-pictures", title, head, rows, notes=notes)


def capture_padding(bench: Bench, lengths: np.ndarray) -> None:
    windows = [Work.of(lengths[begin : begin + WINDOW]) for begin in range(0, len(lengths), WINDOW)]
    shares = []
    for one in windows:
        rounds = deal(one, num_ranks=1, limits=Limits(tokens=16384))
        shares.append((padding_share(rounds, one), int(one.lengths.sum())))
    mean = sum(share * tokens for share, tokens in shares) / sum(tokens for _, tokens in shares)
    name = f"padding of a capture, windows of {WINDOW}, `batch_tokens` of 16,384"
    row = figure(name, 100 * mean, ".1f", unit=" %", most=5)
    bench.show("steps-padding", "Padding of a capture's batches", FIGURES, [row])


# Ways of dealing a step's examples, by their lengths, and whether they are packed; the first is what others are
# compared with.
WAYS: dict[str, tuple[Callable[[np.ndarray], Deal], bool]] = {
    "four in each microbatch": (lambda lengths: by_number(lengths, NUM_RANKS, 4), False),
    "two in each microbatch": (lambda lengths: by_number(lengths, NUM_RANKS, 2), False),
    "balanced, 4,096 tokens": (lambda lengths: balanced(lengths, NUM_RANKS, packed=False), False),
    "balanced and packed": (lambda lengths: balanced(lengths, NUM_RANKS, packed=True), True),
}


def make_student(folder: Path, source: str) -> Path:
    """A Qwen3-VL with random weights: the folder of a small Qwen3.5, its model exchanged."""
    texts = (
        text for one in open_split(DataConfig(source=source), "train") for text in (one.question, one.answer)
    )
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=2048)
    sizes = {"hidden_size": 384, "num_layers": 2, "vision_hidden_size": 96, "vision_depth": 2, "seed": 1}
    student = make_small_model(folder / "student", tokenizer=tokenizer, **sizes)
    config = json.loads((student / "config.json").read_text())
    text = config["text_config"] | {"model_type": "qwen3_vl_text", "head_dim": 32}
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [8, 4, 4]}
    vision = config["vision_config"] | {"model_type": "qwen3_vl", "deepstack_visual_indexes": [0]}
    config |= {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).save_pretrained(student)
    return student


def make_recipe(folder: Path, source: str, num_steps: int) -> Recipe:
    tree = {
        "data": {"source": source, "max_pixels": 512 * 512, "splits": {"train": "train", "validation": None}},
        "student": {"model": str(folder / "student"), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 16, "max_steps": num_steps},
        "run": {"name": "bench", "root": str(folder)},
    }
    return validate_tree(Recipe, tree, origin="recipe of the benchmark")


class Timed(NamedTuple):
    """Of a step: seconds until the last rank is done, those that the busier rank computes, tokens of all ranks."""

    by_clock: float
    computing: float
    num_tokens: int


def times_of(recipe: Recipe, world: World) -> list[dict[str, Timed]]:
    """Of each step, by the way of dealing."""
    inputs = open_inputs(recipe, world)
    student = build_student(recipe, world, num_token_ids=inputs.processor.num_token_ids)
    optimizer = make_optimizer(student, recipe.optimization)
    assert recipe.optimization.max_steps is not None
    found = []
    for step in range(-1, recipe.optimization.max_steps):  # the first one is for warming up
        names = list(WAYS)[step % len(WAYS) :] + list(WAYS)[: step % len(WAYS)]
        timed = {
            name: time_of(name, max(0, step), recipe, inputs, student, optimizer, world) for name in names
        }
        found += [timed] if step >= 0 else []
    return found


def time_of(
    name: str,
    step: int,
    recipe: Recipe,
    inputs: Inputs,
    student: StudentWithLoss,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> Timed:
    dealt, is_packed = WAYS[name]
    examples = step_examples(step, step_shape(recipe, inputs.train.num_examples))
    source = inputs.training_source()
    source.packing = is_packed
    microbatches: list[Microbatch] = []
    for ranks in dealt(inputs.train.lengths[examples]):
        chosen = examples[list(ranks[world.rank] or ranks[0][-1:])]
        slot = Slot(step, tuple(chosen.tolist()), counts=bool(ranks[world.rank]))
        microbatches.append(source.microbatch(slot, inputs.train.rows[chosen].tolist()))
    counts = torch.tensor([[m.num_positions, m.num_tokens] for m in microbatches]).sum(dim=0)
    dist.all_reduce(counts)
    num_positions, num_tokens = counts.tolist()
    world.barrier()
    begin, begin_computing = time.perf_counter(), time.process_time()
    options = {"num_positions": num_positions, "num_tokens": num_tokens, "max_grad_norm": 1.0}
    train_step(student, optimizer, microbatches, world, **options)
    computing = torch.tensor(time.process_time() - begin_computing)
    dist.all_reduce(computing, dist.ReduceOp.MAX)
    return Timed(time.perf_counter() - begin, computing.item(), num_tokens)


def speed(bench: Bench, source: str, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_student(folder, source)
        found = on_two_ranks(make_recipe(folder, source, num_steps))
    first, rows = next(iter(WAYS)), []
    for name in WAYS:
        rows.append([name])
        for what in ("by_clock", "computing"):
            rate = statistics.median(one[name].num_tokens / getattr(one[name], what) for one in found)
            ratios = [getattr(one[first], what) / getattr(one[name], what) for one in found]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ratio = "1" if name == first else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rows[-1] += [f"{rate:,.0f}", ratio]
    notes = (
        f"{NUM_RANKS} ranks, {num_steps} steps of 16 examples. Ratios are to the first line, step by step: medians, "
        "quartiles in brackets."
    )
    head = ("dealing", "tokens/s by the clock", "ratio", "tokens/s, computing", "ratio")
    bench.show("steps-speed", "Ways of dealing, timed", head, rows, notes=notes)


def on_two_ranks(recipe: Recipe) -> list[dict[str, Timed]]:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, recipe, results)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return results.get(timeout=60)  # there is none where a rank has failed


def _rank(rank: int, port: int, recipe: Recipe, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed(device="cpu") as world:
        found = times_of(recipe, world)
        if world.is_main:
            results.put(found)
        world.release_memory()
        world.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--speed", action="store_true", help="train on two ranks, too; needs the source")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    bench = Bench("steps")
    lengths = lengths_of(arguments.source)
    table(bench, lengths)
    prices(bench, lengths)
    capture_padding(bench, lengths)
    pictures(bench)
    if arguments.speed:
        speed(bench, arguments.source, arguments.steps)


if __name__ == "__main__":
    main()
