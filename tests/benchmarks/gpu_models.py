"""A student's step and a teacher's capture of Qwen3.5's full shapes, by the functions that the commands call."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shared.errors import is_out_of_memory
from shared.models.vlm import split
from shared.recipes import Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.training.inputs import open_inputs
from tests.benchmarks.bench_capture import measure as measure_capture
from tests.benchmarks.bench_training import Step, data_wait, some_steps
from tests.benchmarks.full_shapes import make_recipe, prepare
from tests.benchmarks.gpu_figures import GIB, MODULE_OF_FLA, Figure, taking_turns

BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}  # dense, from NVIDIA's data sheets; the first name that fits counts
MOST_AGAINST_FINE_TUNING, MOST_WAITING, MOST_AGAINST_FORWARD = 1.02, 2.0, 1.03


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for short, flops in BF16_FLOPS.items() if short in name), None)


def step_flops(model: PreTrainedModel, *, num_tokens: int, num_positions: int) -> int:
    """What training needs: 6 for each trained number and token, of the head for each answer position.

    Embeddings apart from the head are only looked up.  What is computed again, and what is frozen, do not count.
    """
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    head = trained.pop(id(split(model)[1].weight_VD), 0)
    trained.pop(id(model.get_input_embeddings().weight), 0)
    return 6 * (sum(trained.values()) * num_tokens + head * num_positions)


def release(device: torch.device) -> None:
    """What is no longer used, so that the next model has the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def student(root: Path, device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """A step of 16 examples: distilling against fine-tuning."""
    model = prepare(root, "4B", device=device, tiny=tiny)
    recipe = make_recipe(root, model, tiny=tiny)
    with distributed(device=device.type) as world:
        if status := capture(recipe, world, StopRequest()):
            raise RuntimeError(f"the capture of the student's cache: status {status}")
    release(device)
    try:
        yield from _student(recipe, device)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"  with fp32 parameters: {str(error).splitlines()[0]}. In bf16:")
    release(device)  # not within ``except``: the error's traceback holds the first attempt
    yield from _student(make_recipe(root, model, tiny=tiny, param_dtype="bfloat16"), device)


def _student(recipe: Recipe, device: torch.device) -> Iterator[Figure]:
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with distributed(device=device.type) as world:
        inputs = open_inputs(recipe, world)
        step = Step(recipe, inputs, world)
        microbatches, _ = next(iter(some_steps(recipe, inputs, num_steps=1)))
        distil_ms, finetune_ms = taking_turns(
            [partial(step.distil, microbatches), partial(step.finetune, microbatches)], device
        )
        num_positions = sum(one.num_positions for one in microbatches)
        num_tokens = sum(one.num_tokens for one in microbatches)
        text = [p for p in step.student.parameters() if p.requires_grad]
        num_trained = sum(p.numel() for p in text)
        has_fla = "with" if is_cuda and importlib.util.find_spec(MODULE_OF_FLA) else "without"
        title = f"step of {recipe.optimization.global_batch_size} examples, {num_trained / 1e9:.3g} B trained"
        title += f", {recipe.student.param_dtype} parameters, {has_fla} flash-linear-attention"
        yield Figure(f"{title}: distilling", distil_ms, "ms")
        yield Figure("- against fine-tuning", distil_ms / finetune_ms, "", MOST_AGAINST_FINE_TUNING)
        yield Figure("- tokens", num_tokens / distil_ms * 1e3, "/s")
        yield Figure("- answer positions", num_positions / distil_ms * 1e3, "/s")
        if flops := peak_flops(device):
            used = step_flops(step.student.model, num_tokens=num_tokens, num_positions=num_positions)
            yield Figure("- model FLOPS utilization", 100 * used / (distil_ms / 1e3) / flops, "%")
        yield Figure("- waiting for data, two workers", 100 * data_wait(step), "%", MOST_WAITING)
        if is_cuda:
            yield Figure("- peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
        step.student = step.optimizer = None  # type: ignore[assignment]
        del step, inputs, microbatches, text
        release(device)


def teacher(root: Path, device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """A capture against the bare forward pass on the same batches."""
    model = prepare(root, "9B", device=device, tiny=tiny)
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the model that was written is no part of a capture
    recipe = make_recipe(root, model, tiny=tiny)
    begin = time.monotonic()
    found = measure_capture(recipe, root / "captures", device=device, rounds=3)
    yield Figure(
        f"capture with {found.num_parameters / 1e9:.3g} B parameters, against the bare forward pass",
        statistics.median(found.ratios),
        "",
        MOST_AGAINST_FORWARD,
    )
    yield Figure("- tokens", found.num_tokens / statistics.median(found.seconds), "/s")
    yield Figure("- answer positions", found.num_positions / statistics.median(found.seconds), "/s")
    yield Figure("- outside of the teacher's own work", 100 * statistics.median(found.outside), "%")
    if device.type == "cuda":
        yield Figure("- peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
    yield Figure("- all rounds, and loading", time.monotonic() - begin, "s")
