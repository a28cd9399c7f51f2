"""How evenly a step's examples are dealt to ranks: counts on the lengths of real examples, nothing is trained.

    python -m tests.benchmarks.bench_steps [--source ../shared/medpix-vqa]

The critical path is the costliest microbatch of each round, summed over the rounds of an epoch's steps, in tokens
with padding; the bound below it is what no dealing can beat: the longest example, or all tokens shared out evenly.
Lengths are the survey's: text at four characters a token, pictures as Qwen's processor counts them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.data.images import size_of
from shared.data.rows import open_split
from shared.dealing import Deal, Limits, critical_path, deal, padding_share
from shared.recipes import DataConfig
from stage1_teacher.capturing.windows import WINDOW

SOURCE = "../shared/medpix-vqa"
PIXELS_PER_TOKEN = 32 * 32  # patches of 16 x 16, four of them merged
TEMPLATE_TOKENS = 30
CHARACTERS_PER_TOKEN = 4  # of English prose, roughly
BUDGET = 4096


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


def steps(lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(lengths))
    return (lengths[order[begin : begin + batch]] for begin in range(0, len(order), batch))


def table(lengths: np.ndarray) -> None:
    print(f"critical path / bound, and rounds of a step; budget {BUDGET} tokens")
    print(f"{'batch':>6}{'ranks':>6}{'by 1':>14}{'by 2':>14}{'by 4':>14}{'dealt':>14}")
    for batch, num_ranks in itertools.product((16, 64, 256), (1, 2, 8, 64)):
        parts = list(steps(lengths, batch))
        bound = sum(max(int(one.max()), one.sum() / num_ranks) for one in parts)
        deals = {str(size): [by_number(one, num_ranks, size) for one in parts] for size in (1, 2, 4)}
        deals["dealt"] = [deal(one, num_ranks=num_ranks, limits=Limits(tokens=BUDGET)) for one in parts]
        cells = []
        for found in deals.values():
            path = sum(critical_path(rounds, one) for rounds, one in zip(found, parts, strict=True))
            cells.append(f"{path / bound:.2f} ({np.mean([len(rounds) for rounds in found]):.1f})")
        print(f"{batch:>6}{num_ranks:>6}" + "".join(f"{cell:>14}" for cell in cells))


def capture_padding(lengths: np.ndarray) -> None:
    windows = [lengths[begin : begin + WINDOW] for begin in range(0, len(lengths), WINDOW)]
    shares = []
    for one in windows:
        rounds = deal(one, num_ranks=1, limits=Limits(tokens=16384))
        shares.append((padding_share(rounds, one), int(one.sum())))
    mean = sum(share * tokens for share, tokens in shares) / sum(tokens for _, tokens in shares)
    print(f"capture, windows of {WINDOW}, batch_tokens 16384: {mean:.1%} of the tokens are padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE)
    lengths = lengths_of(parser.parse_args().source)
    print(f"{len(lengths)} examples of {lengths.mean():.0f} tokens, {lengths.min()} to {lengths.max()}")
    table(lengths)
    capture_padding(lengths)


if __name__ == "__main__":
    main()
