"""A student answers the prompts of its recipe's splits: ``train-student write``.

    write(run_folder, recipe, checkpoint, world, stop)       called by all ranks; returns an exit status

The checkpoint is exported, adapters merged, into a folder that is gone when every rank has opened it: the student
answers as its users will have it.  Every rank has a whole copy and claims units.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.data.processing import ExampleProcessor
from shared.data.rows import open_split
from shared.errors import RecipeError
from shared.models.vlm import load_vlm, num_logit_ids
from shared.models.weights import weight_fingerprint
from shared.recipes import Recipe, WriteConfig, load_recipe
from shared.runtime import World
from shared.same_prompts import open_processor_of
from shared.stopping import StopRequest
from shared.writing.copies import Copy
from shared.writing.loop import Author, asked
from shared.writing.loop import write as write_answers
from shared.writing.plan import SetFolder, Writer, as_it_began
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.export import export_checkpoint

STUDENT = ".student"  # in the folder of answers, while ranks open it


def default_folder(folder: RunFolder, checkpoint: Checkpoint) -> Path:
    """In the run's own, one for each checkpoint."""
    return folder.path / "written" / checkpoint.path.name


def write(
    run: RunFolder,
    recipe: Recipe,
    checkpoint: Checkpoint,
    world: World,
    stop: StopRequest,
    *,
    out: Path | None = None,
) -> int:
    """Makes a folder hold the student's answer to each prompt; returns the exit status.

    out      by default ``default_folder``
    Raises   TeachonceError  of the kind that fits
    """
    config = recipe.write or WriteConfig()
    if recipe.student.other_vocabulary:
        world.by_main(lambda: _require_texts(recipe, config))
    folder = SetFolder(out or default_folder(run, checkpoint))
    with folder.taken(world):
        recipe = world.by_main(lambda: as_it_began(recipe, folder))
        with _exported(run, checkpoint, folder, world) as student:
            processor = open_processor_of(recipe, str(student), revision=None)
            prompts = asked(recipe, processor, config, world)
            model = _opened(recipe, str(student), processor, world)
        step = checkpoint.facts.step
        if world.is_main:
            num_prompts = len(prompts.keys)
            tqdm.write(
                f"student {run.path}, step {step}, answers {num_prompts:,} prompts; answers {folder.path}"
            )
        author = Author(model, Copy(), _writer(run, recipe, step, model) if world.is_main else None)
        return write_answers(recipe, config, processor, prompts, author, folder, world, stop)


def _require_texts(recipe: Recipe, config: WriteConfig) -> None:
    """Raises   RecipeError  when rows have answers as ids, which are those of the teacher's tokenizer"""
    for name in config.splits:
        if getattr(recipe.data.splits, name) is None:
            continue
        split = open_split(recipe.data, name)
        if "answer_ids" in split.columns:
            raise RecipeError(
                f"data.source {split.source}: its rows have token ids of the teacher (column "
                f"{split.columns['answer_ids']}), whose tokenizer is another one than this student's. Let it answer "
                "the rows that the set was written to: give --recipe with these as data.source"
            )


@contextmanager
def _exported(run: RunFolder, checkpoint: Checkpoint, folder: SetFolder, world: World) -> Iterator[Path]:
    """The checkpoint as a whole model's folder, for all ranks; removed when all have left the block."""
    student = folder.path / STUDENT
    has_adapters = load_recipe(run.recipe).student.lora is not None

    def export() -> None:
        shutil.rmtree(student, ignore_errors=True)  # of a process that was killed
        export_checkpoint(run, checkpoint, student, merge=True if has_adapters else None)

    try:
        world.by_main(export)
        yield student
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(student, ignore_errors=True)


def _opened(recipe: Recipe, student: str, processor: ExampleProcessor, world: World) -> PreTrainedModel:
    model = load_vlm(
        student,
        revision=None,
        dtype=getattr(torch, recipe.student.compute_dtype),
        attn_implementation=recipe.student.attn_implementation,
        device=world.device,
    )
    num_logit_ids(
        model,
        processor.num_token_ids,
        num_answer_ids=processor.num_answer_ids,
        what=f"student {student}",
    )
    nn.Module.to(model, world.device)  # past the model's own, which refuses some quantised ones
    return model


def _writer(run: RunFolder, recipe: Recipe, step: int, model: PreTrainedModel) -> Writer:
    return Writer(
        "student",
        recipe.student.model,
        recipe.student.revision,
        weight_fingerprint(model),
        recipe.student.compute_dtype,
        run=str(run.path),
        step=step,
    )
