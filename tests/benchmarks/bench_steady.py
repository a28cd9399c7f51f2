"""Memory, descriptors and threads through a long capture and a long training, of microscopic models.

    python -m tests.benchmarks.bench_steady [--rows 1000000] [--steps 100000] [--only capture|training] [--root DIR]

Both are the ordinary commands, in processes of their own, which are looked at from outside: what grows with the
number of rows or steps shows as a line that rises.  The training reads the first rows in many epochs, from a cache
of their own: so it waits for nothing, and the two may run side by side.  A folder given as ``--root`` is kept, and
what it has is not made again: both go on.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from shared.small_models import make_small_model, train_tokenizer
from tests.benchmarks.tables import Bench

ROWS_PER_FILE = (
    5_000  # so many files, and rows of so many bytes, that what a reader keeps reaches its bounds soon
)
TRAINED_ROWS = 20_000
WITH_PICTURE = 8  # one row of so many; the others are text
PICTURES = 64  # different ones
SIDE = 32  # pixels
MOMENTS = (0.1, 0.25, 0.5, 0.75, 0.98)  # of the time that a command takes
WORDS = ("lung", "heart", "left", "right", "clear", "mass", "bone", "scan", "axial", "fluid")
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Of a command's process and those that it started, at one moment."""

    seconds: float
    own_mib: float  # memory that no file backs, of the main process
    all_mib: float  # of all processes
    descriptors: int
    threads: int
    processes: int


def family_of(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family_of(int(child))
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                for child in (task / "children").read_text().split():
                    yield from family_of(int(child))


def figures_of(pid: int) -> tuple[float, int, int]:
    """Memory in MiB, descriptors, threads; nothing of a process that has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        kib = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return kib * 1024 / MIB, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(fields["Threads"])
    except (OSError, KeyError):
        return 0.0, 0, 0


def sample(pid: int, seconds: float) -> Sample:
    found = [figures_of(one) for one in family_of(pid)]
    memory, descriptors, threads = (sum(values) for values in zip(*found, strict=True))
    return Sample(seconds, found[0][0], memory, int(descriptors), int(threads), len(found))


def watched(arguments: Sequence[str], *, every_s: float) -> list[Sample]:
    """Runs a command, and looks at it at each interval.

    Raises:
        SystemExit: it failed.
    """
    begin, samples = time.monotonic(), []
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        samples.append(sample(process.pid, time.monotonic() - begin))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=every_s)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return samples


HEAD = ("at", "main process", "all", "descriptors", "threads", "processes")


def at_moments(samples: list[Sample]) -> list[list[str]]:
    """Under ``HEAD``: the median of what was seen around each."""
    rows, around = [], max(1, len(samples) // 40)
    for moment in MOMENTS:
        middle = min(len(samples) - 1, round(moment * len(samples)))
        some = samples[max(0, middle - around) : middle + around + 1]

        def median(name: str, some: list[Sample] = some) -> float:
            return float(np.median([getattr(one, name) for one in some]))

        memory = [f"{median(name):,.0f} MiB" for name in ("own_mib", "all_mib")]
        counts = [f"{median(name):.0f}" for name in ("descriptors", "threads", "processes")]
        rows.append([f"{moment:.0%}", *memory, *counts])
    return rows


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def words_of(number: int, count: int) -> str:
    return " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(count))


def write_data(folder: Path, num_rows: int) -> None:
    """Parquet files of the split ``train``, each row with a question of its own."""
    folder.mkdir(parents=True)
    pictures = [picture(seed) for seed in range(PICTURES)]
    num_files = -(-num_rows // ROWS_PER_FILE)
    for file in range(num_files):
        numbers = range(file * ROWS_PER_FILE, min((file + 1) * ROWS_PER_FILE, num_rows))
        shown = [
            None if number % WITH_PICTURE else {"bytes": pictures[number // WITH_PICTURE % PICTURES]}
            for number in numbers
        ]
        table = pa.table(
            {
                "image": pa.array(shown, pa.struct({"bytes": pa.binary()})),
                "question": [f"{number}?" for number in numbers],
                "answer": [words_of(number, 3) for number in numbers],
            }
        )
        pq.write_table(table, folder / f"train-{file:05}-of-{num_files:05}.parquet")


def prepare(root: Path, *, num_rows: int) -> None:
    """Data, teacher and student, each made if it is not there."""
    if not (root / "data").exists():
        write_data(root / "data", num_rows)
    if not (root / "teacher").exists():
        texts = [*WORDS, *(f"{number}?" for number in range(1000))]
        tokenizer = train_tokenizer(texts, root / "tokenizer", vocab_size=320)
        for name, hidden_size in (("teacher", 64), ("student", 32)):
            make_small_model(
                root / name,
                tokenizer=tokenizer,
                hidden_size=hidden_size,
                num_layers=1,
                vision_hidden_size=32,
                vision_depth=1,
                seed=1,
            )


def write_recipe(root: Path, name: str, *, limit: int | None, num_steps: int) -> str:
    """The recipe's file: of the first rows where there is a limit, with a cache and a run of that name."""
    recipe = {
        "data": {
            "source": str(root / "data"),
            "splits": {"validation": None},
            "limit": limit,
            "max_answer_tokens": 8,
            "text_only": True,
        },
        "teacher": {"model": str(root / "teacher"), "dtype": "float32"},
        "cache": {
            "path": str(root / f"{name}-cache"),
            "splits": ["train"],
            "examples_per_shard": 4096,
            "policy": {
                "kind": "threshold",
                "tau": 1 / 16,
            },  # weights are random: nearly all tokens are above 1/512
        },
        "student": {"model": str(root / "student"), "compute_dtype": "float32"},
        "optimization": {
            "global_batch_size": 2,
            "microbatch_size": 2,
            "max_steps": num_steps,
            "learning_rate": 1e-4,
        },
        "run": {"name": name, "root": str(root / "runs"), "export": False},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--only", choices=("capture", "training"))
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--root", type=Path, help="a folder that is kept")
    chosen = parser.parse_args()
    bench = Bench("steady", goes_on=chosen.root is not None and chosen.root.exists())
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.root or Path(scratch)
        prepare(root, num_rows=chosen.rows)
        if chosen.only != "training":
            recipe = write_recipe(root, "capture", limit=None, num_steps=1)
            samples = watched(["stage1_teacher", "capture", recipe], every_s=chosen.every)
            title = f"Capture of {chosen.rows:,} rows, {samples[-1].seconds:,.0f} s"
            bench.show("steady-capture", title, HEAD, at_moments(samples))
        if chosen.only != "capture":
            recipe = write_recipe(root, "training", limit=TRAINED_ROWS, num_steps=chosen.steps)
            watched(["stage1_teacher", "capture", recipe], every_s=chosen.every)
            resume = ["--resume"] if (root / "runs" / "training").exists() else []
            samples = watched(["stage2_student", "run", recipe, *resume], every_s=chosen.every)
            title = f"Training of {chosen.steps:,} steps, {samples[-1].seconds:,.0f} s"
            bench.show("steady-training", title, HEAD, at_moments(samples))


if __name__ == "__main__":
    main()
