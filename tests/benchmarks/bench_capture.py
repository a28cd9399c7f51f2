"""What a capture adds to the teacher's bare forward pass, on the same batches, taking turns.

    python -m tests.benchmarks.bench_capture

Bare: the body on whole sequences, the head on the answer positions.  Capture: the same, and log-softmax, sparse
targets, the hand-over, payloads, and the shards on disk.  Pictures are decoded beforehand for both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shared.batching import batches_of_like_length
from shared.cache import CacheWriter, Claims, Wanted
from shared.capture.planning import identity_of, survey
from shared.data.collation import Encoded
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.phantom.dataset import write_dataset
from shared.recipes import DataConfig, Recipe
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.small_models import make_small_model, train_tokenizer
from stage1_teacher.capture import capture_batch
from stage1_teacher.capturing.handover import BackgroundWriter
from stage1_teacher.capturing.progress import Tally
from stage1_teacher.capturing.shards import CapturedBatch, ShardAssembler
from stage1_teacher.capturing.teacher import Teacher, load_teacher
from tests.benchmarks.tables import FIGURES, Bench, figure

ROUNDS = 5
PICTURES = 24


def make_recipe(folder: Path, *, hidden_size: int, num_layers: int) -> Recipe:
    data, model = folder / "data", folder / "teacher"
    if not data.exists():
        write_dataset(data, pictures={"train": PICTURES, "validation": 1, "test": 1})
    texts = [
        text
        for one in open_split(DataConfig(source=str(data)), "train")
        for text in (one.question, one.answer)
    ]
    make_small_model(
        model,
        tokenizer=train_tokenizer(texts, folder / "tokenizer", vocab_size=4096),
        hidden_size=hidden_size,
        num_layers=num_layers,
        vision_hidden_size=128,
        vision_depth=4,
        seed=0,
    )
    tree = {
        "data": {"source": str(data), "splits": {"validation": None}},
        "teacher": {"model": str(model), "dtype": "float32"},
        "cache": {"path": str(folder / "cache"), "splits": ["train"], "batch_tokens": 1024},
        "student": {"model": str(model)},
        "optimization": {"max_steps": 1},
        "run": {"name": "bench"},
    }
    return validate_tree(Recipe, tree, origin="benchmark")


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of all threads' processor time."""
    begin, worked = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - worked


def bare(teacher: Teacher, batches: list[list[Encoded]], collate: Callable, chunk_size: int) -> None:
    with torch.inference_mode():
        for batch in batches:
            hidden_ND = teacher.hidden(collate(batch).to(teacher.device, non_blocking=True))
            for hidden_nD in hidden_ND.split(chunk_size):
                teacher.head.logits(hidden_nD)


@dataclass(frozen=True)
class Found:
    """Of each round: capture by bare forward pass, by the clock and in processor time; its seconds, and the share of
    them outside the teacher's own work.
    """

    ratios: list[float]
    processor_ratios: list[float]
    seconds: list[float]
    outside: list[float]
    num_positions: int
    num_tokens: int
    num_parameters: int
    vocab_size: int


def measure(recipe: Recipe, folder: Path, *, device: torch.device, rounds: int = ROUNDS) -> Found:
    """Captures the training split into ``folder``, and runs the teacher alone on the same batches, taking turns.

    Every other round begins with the capture, so that neither always follows the other.
    """
    assert recipe.teacher is not None
    assert recipe.cache is not None
    cache = recipe.cache
    processor = open_processor(recipe.teacher.model, recipe.data)
    ratios, processor_ratios, seconds, outside = [], [], [], []
    with distributed(device=device.type) as world:
        teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
        data = survey(recipe, processor)
        identity = identity_of(recipe, processor, data, weights_fingerprint="0")
        encoded = [processor.encode(example) for example in data.keyed[0].split]
        order = batches_of_like_length([len(one.input_ids) for one in encoded], max_tokens=cache.batch_tokens)
        batches = [[encoded[index] for index in some] for some in order]

        def captured(path: Path) -> None:
            with CacheWriter.open(str(path), identity, created_by={}) as writer:
                plan = writer.plan(
                    Wanted.of(data.keys, data.numbers), examples_per_shard=cache.examples_per_shard
                )
                with Claims(writer.folder, plan.units, timeout_s=cache.claim_timeout_s) as claims:
                    tally = Tally(claims, len(encoded), show=False)
                    assembler = ShardAssembler(writer, plan.units, on_rows=tally.add, on_shard=claims.finish)
                    unit_id = plan.units[0].unit_id
                    with BackgroundWriter[CapturedBatch](assembler.take, max_pending=4) as background:
                        for batch in batches:
                            background.put(capture_batch(batch, unit_id, processor, teacher, cache, names=[]))
                writer.commit(plan)

        forward = partial(
            bare, teacher, batches, processor.collate, teacher.chunk_positions(cache.chunk_size)
        )
        forward()
        for round_index in range(rounds):
            path = folder / f"cache{round_index}"
            shutil.rmtree(path, ignore_errors=True)  # of a run before: nothing would be left to capture
            took = {}
            for function in (forward, partial(captured, path))[:: -1 if round_index % 2 else 1]:
                at_work_s = -teacher.stopwatch.seconds()
                took[function is forward] = timed(function, device)
                at_work_s += teacher.stopwatch.seconds()
                if function is not forward:
                    outside.append(1 - at_work_s / took[False][0])
            (capture_s, worked_s), (bare_s, bare_worked_s) = took[False], took[True]
            seconds.append(capture_s)
            ratios.append(capture_s / bare_s)
            processor_ratios.append(worked_s / bare_worked_s)
    return Found(
        ratios,
        processor_ratios,
        seconds,
        outside,
        num_positions=sum(one.num_positions for one in encoded),
        num_tokens=sum(len(one.input_ids) for one in encoded),
        num_parameters=sum(p.numel() for p in teacher.model.parameters()),
        vocab_size=processor.num_token_ids,
    )


def scatter(ratios: list[float]) -> str:
    return f" ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    torch.set_num_threads(1)
    bench, rows = Bench("capture"), []
    for hidden_size, num_layers in [(192, 8), (512, 12)]:
        with tempfile.TemporaryDirectory() as scratch:
            recipe = make_recipe(Path(scratch), hidden_size=hidden_size, num_layers=num_layers)
            found = measure(recipe, Path(scratch), device=torch.device("cpu"))
        name = f"capture against the bare forward pass, teacher of {found.num_parameters / 1e6:.0f} M"
        rows.append(figure(name, statistics.median(found.ratios), more=scatter(found.ratios), most=1.05))
        worked = found.processor_ratios
        rows.append(figure("the same in processor time", statistics.median(worked), more=scatter(worked)))
    notes = (
        f"{found.num_positions:,} positions, V = {found.vocab_size:,}. One thread computes; a capture has a second "
        f"one that writes, which only processor time counts in full. Medians of {ROUNDS} rounds (range)."
    )
    bench.show("capture", "What a capture adds to the forward pass", FIGURES, rows, notes=notes)


if __name__ == "__main__":
    main()
