"""The survey of all rows: by two ranks against one, and the next start, which reads what was kept.

    python -m tests.benchmarks.bench_survey [--rows 16384] [--second-rows 65536]

Rows are synthetic: a small PNG, question and answer, in Parquet files.  One rank and two take turns on the same rows
in the same processes, so what else the machine does falls on both; each time nothing is kept yet.  CPU time is the
mean of the ranks, which on a quiet machine do equal parts: what the machine's other work takes is not in it.  For the
second start, new processes open the data, the processor and what was kept.
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shared.cache import Wanted
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.recipes import DataConfig
from shared.runtime import World
from shared.small_models import make_small_model, train_tokenizer
from shared.surveying import Surveyors, survey_keys
from shared.surveying.kept import Kept
from shared.surveying.parts import parts_of
from tests.benchmarks.tables import Bench

ROWS_OF_A_FILE = 65_536
ROWS_OF_A_GROUP = 4_096
NUM_REPEATS = 5
RANKS_TIMEOUT_S = 24 * 3600


def write_rows(folder: Path, number: int) -> DataConfig:
    """Rows of about 300 bytes, no two alike."""
    folder.mkdir()
    files = [_png(size=(16 + 8 * (shade % 4), 16 + 4 * (shade % 3)), seed=shade) for shade in range(12)]
    for first in range(0, number, ROWS_OF_A_FILE):
        rows = range(first, min(first + ROWS_OF_A_FILE, number))
        pictures = [{"bytes": files[row % 12] + row.to_bytes(8), "path": None} for row in rows]
        table = {
            "image_id": pictures,
            "question": [
                f"Which of the findings is in picture {row}, and where does it lie?" for row in rows
            ],
            "answer": [
                f"A small mass of {row % 90} mm, in the upper part of lobe {row % 5}." for row in rows
            ],
        }
        name = f"train-{first // ROWS_OF_A_FILE:05d}.parquet"
        pq.write_table(pa.table(table), folder / name, row_group_size=ROWS_OF_A_GROUP)
    return DataConfig(source=str(folder))


def _png(*, size: tuple[int, int], seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 4, size, dtype=np.uint8) * 60
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_model(folder: Path) -> Path:
    texts = [f"Which of the findings is in picture {n}? A small mass of {n} mm in lobe." for n in range(100)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=512)
    sizes = {"hidden_size": 64, "num_layers": 2, "vision_hidden_size": 32, "vision_depth": 1}
    return make_small_model(folder / "model", tokenizer=tokenizer, seed=0, **sizes)


@dataclass(frozen=True)
class Spent:
    wall_s: float
    cpu_s: float


def spent(work: Callable[[], Any]) -> Spent:
    """By this process and those that it has started and waited for."""
    wall, cpu = time.perf_counter(), _cpu_s()
    work()
    seconds = time.perf_counter() - wall
    gc.collect()  # ends its loader, whose processes count when they have been waited for
    multiprocessing.active_children()
    return Spent(seconds, _cpu_s() - cpu)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def take_turns(
    data: DataConfig, processor: ExampleProcessor, folder: Path, world: World
) -> dict[str, list[Spent | None]]:
    """What each repeat takes of this rank; None where the first one works alone."""
    found: dict[str, list[Spent | None]] = {"one": [], "two": [], "one, two processes": []}
    for repeat in range(NUM_REPEATS):
        for way in found:
            kept_at = str(folder / f"kept-{repeat}-{way}")
            world.barrier()
            surveyors = Surveyors(kept_at=kept_at, num_workers=2 if "processes" in way else 0)
            if way == "two":
                surveyors = Surveyors(world, kept_at)
            elif not world.is_main:
                found[way].append(None)
                continue
            found[way].append(spent(functools.partial(survey_keys, data, "train", processor, surveyors)))
    return found


def shared_table(
    bench: Bench, data: DataConfig, processor: ExampleProcessor, folder: Path, num_rows: int
) -> None:
    from stage2_runs import on_ranks

    ranks = on_ranks(2, lambda world: take_turns(data, processor, folder, world))
    turns = {
        way: [[one for one in both if one] for both in zip(*(r[way] for r in ranks), strict=True)]
        for way in ranks[0]
    }
    wall = {way: [max(one.wall_s for one in both) for both in found] for way, found in turns.items()}
    cpu = {
        way: [statistics.mean(one.cpu_s for one in both) for both in found] for way, found in turns.items()
    }
    rows = []
    for way in turns:
        seconds, of_cpu = statistics.median(wall[way]), statistics.median(cpu[way])
        faster, by_cpu = (
            statistics.median(a / b for a, b in zip(times["one"], times[way], strict=True))
            for times in (wall, cpu)
        )
        cells = [way, f"{seconds:.2f}", f"{num_rows / seconds:,.0f}", f"{faster:.2f}", f"{of_cpu:.2f}"]
        rows.append([*cells, "-" if "processes" in way else f"{by_cpu:.2f}"])
    bench.show(
        "survey-shared",
        "The first survey, by one rank and by two",
        ("ranks", "seconds", "rows a second", "times as fast", "CPU seconds of a rank", "by CPU time"),
        rows,
        notes=f"{num_rows:,} rows, medians of {NUM_REPEATS}.",
    )


def second_start(folder: str, world: World) -> dict[str, float]:
    """Of a new process: seconds of its parts, and its memory at most."""
    root = Path(folder)
    data, times = DataConfig(source=str(root / "data")), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin, cpu = time.perf_counter(), _cpu_s()
        found = work()
        times[name] = time.perf_counter() - begin
        times[f"{name}, by CPU time"] = _cpu_s() - cpu
        return found

    times["memory before, MiB"] = _peak_mib()
    processor = timed("processor", lambda: open_processor(str(root / "model"), data))
    world.barrier()
    surveyors = Surveyors(world, str(root / "kept"))
    found = timed("survey", lambda: survey_keys(data, "train", processor, surveyors))
    times["memory, MiB"] = _peak_mib()
    split = timed("of these, opening the data", lambda: open_split(data, "train"))
    kept = Kept.of(str(root / "kept"), split, processor, decode=False)
    mine = parts_of(split)[world.rank :: world.size]
    timed("of these, reading Arrow", lambda: [kept.read(part) for part in mine])
    timed("planning a capture's rows", lambda: Wanted.of(found.keys, found.rows))
    return times


def _peak_mib() -> float:
    """Of this process; getrusage tells what the one that started it had, where that was more."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def second_table(bench: Bench, root: Path, num_rows: int) -> None:
    from stage2_runs import on_ranks

    data, kept = DataConfig(source=str(root / "data")), root / "kept"
    if not (root / "data").exists():
        write_rows(root / "data", num_rows)
    processor = open_processor(str(root / "model"), data)
    first = spent(
        lambda: survey_keys(data, "train", processor, Surveyors(kept_at=str(kept), num_workers=2), show=True)
    )
    size = sum(path.stat().st_size for path in kept.rglob("*.arrow"))
    rows = []
    for number in (1, 2):
        begin = time.perf_counter()
        ranks = on_ranks(number, functools.partial(second_start, str(root)), new=True)
        whole = time.perf_counter() - begin
        rows.append(second_row(number, whole, {name: max(one[name] for one in ranks) for name in ranks[0]}))
    notes = (
        f"{num_rows:,} rows; of two ranks the slower one. Seconds are from the opened processor on, where imports are"
        f" not named. The first start took {first.wall_s:.0f} s with two processes, {first.cpu_s:.0f} s of CPU. "
        f"{size / 2**20:.0f} MiB are kept."
    )
    bench.show("survey-second", "The survey's next start", SECOND_HEAD, rows, notes=notes)


SECOND_HEAD = (
    "ranks",
    "with all imports",
    "survey",
    "reading Arrow",
    "planning a capture",
    "CPU of the survey",
    "most memory of a rank",
    "before the survey",
)


def second_row(number: int, whole_s: float, worst: dict[str, float]) -> list[str]:
    """Under ``SECOND_HEAD``, of ``second_start``."""
    seconds = [worst[name] for name in ("survey", "of these, reading Arrow", "planning a capture's rows")]
    memory = [f"{worst[name]:.0f} MiB" for name in ("memory, MiB", "memory before, MiB")]
    cpu_s = worst["survey, by CPU time"]
    return [str(number), f"{whole_s:.1f} s", *(f"{one:.2f} s" for one in seconds), f"{cpu_s:.2f} s", *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--second-rows", type=int, default=65_536)
    parser.add_argument("--only", choices=["shared", "second"])
    parser.add_argument(
        "--folder", type=Path, help="keeps the rows and what was found of them, for another time"
    )
    chosen = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1]))  # what the tests start ranks with
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import stage2_runs

    stage2_runs.RANKS_TIMEOUT_S = RANKS_TIMEOUT_S
    bench = Bench("survey")
    with tempfile.TemporaryDirectory() as temporary:
        root = chosen.folder or Path(temporary)
        if not (root / "model").exists():
            root.mkdir(exist_ok=True)
            write_model(root)
        if chosen.only != "second":
            with tempfile.TemporaryDirectory() as scratch:
                data = write_rows(Path(scratch) / "data", chosen.rows)
                processor = open_processor(str(root / "model"), data)
                shared_table(bench, data, processor, Path(scratch), chosen.rows)
        if chosen.only != "shared":
            second_table(bench, root, chosen.second_rows)


if __name__ == "__main__":
    main()
