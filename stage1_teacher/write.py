"""The teacher answers the prompts of the recipe's splits: ``teacher-cache write``.

    write(recipe, world, stop)       called by all ranks; returns an exit status

What it writes is a data set like any other, which stage one captures.  Every rank has a copy of the teacher and
claims units; ranks that share a copy, or a teacher that is sharded over all of them, answer each batch together.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from shared.errors import RecipeError
from shared.recipes import Recipe, TeacherConfig, WriteConfig
from shared.runtime import World
from shared.same_prompts import open_processor_of
from shared.stopping import StopRequest
from shared.writing.copies import Copy
from shared.writing.loop import Author, asked
from shared.writing.loop import write as write_answers
from shared.writing.plan import SetFolder, Writer, as_it_began
from stage1_teacher.capturing.teacher import Teacher, load_teacher


def write(recipe: Recipe, world: World, stop: StopRequest, *, out: Path | None = None) -> int:
    """Makes a folder hold the teacher's answer to each prompt; returns the exit status.

    out      by default ``write.path``
    Raises   TeachonceError  of the kind that fits
    """
    config = recipe.write or WriteConfig()
    if recipe.teacher is None:
        raise RecipeError(
            f"recipe of run {recipe.run.name}: it has no teacher section: there is nobody to write"
        )
    if out is None and config.path is None:
        raise RecipeError(
            f"recipe of run {recipe.run.name}: no folder for the answers. Set write.path, or give --out"
        )
    recipe.teacher.require_ranks(world.size)
    folder = SetFolder(Path(out or str(config.path)))
    with folder.taken(world):
        recipe = world.by_main(lambda: as_it_began(recipe, folder))
        assert recipe.teacher is not None
        processor = open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
        prompts = asked(recipe, processor, config, world)
        if world.is_main:
            num_prompts = len(prompts.keys)
            tqdm.write(
                f"teacher {recipe.teacher.model} answers {num_prompts:,} prompts; answers {folder.path}"
            )
        teacher = load_teacher(
            recipe.teacher,
            num_token_ids=processor.num_token_ids,
            num_answer_ids=processor.num_answer_ids,
            world=world,
        )
        author = Author(teacher.model, _copy_of(teacher), _writer(recipe.teacher, teacher))
        return write_answers(recipe, config, processor, prompts, author, folder, world, stop)


def _copy_of(teacher: Teacher) -> Copy:
    return Copy(dist.group.WORLD if teacher.is_sharded else teacher.copy_group)


def _writer(config: TeacherConfig, teacher: Teacher) -> Writer | None:
    if teacher.weights_fingerprint is None:
        return None
    return Writer("teacher", config.model, config.revision, teacher.weights_fingerprint, config.dtype)
