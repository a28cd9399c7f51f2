"""A checkpoint as an ordinary Hugging Face folder: sharded safetensors, tokenizer, processor, settings.

A run with LoRA becomes an adapter's folder, or a whole model's with the adapters merged into its weights.

The run's folder keeps the small files of the student's original folder (``model/``), so that any checkpoint
can be exported at any time, by one process, whether or not the original is still there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
)

from shared.cache.layout import require_in_no_cache
from shared.data.processing import open_processor
from shared.data.processors import chat_template, load_processor, read_template
from shared.errors import CheckpointError, FileError, RecipeError, shortened
from shared.models import adapters
from shared.models.adapters import PROVENANCE, lineage
from shared.models.vlm import load_config
from shared.models.weight_files import GENERATION
from shared.places import is_local
from shared.recipes import DataConfig, Recipe, dump_recipe, load_recipe
from shared.runtime import environment
from shared.temporaries import remove_left, temporary_name
from shared.vouched import vouched
from stage2_student.publishing.card import CARD, model_card, read_sources
from stage2_student.runs.checkpoint import Checkpoint, hashes, load, student_state
from stage2_student.runs.files import write_json, write_text
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.lora import merge_adapters, save_adapters
from stage2_student.training.student import choose_trained, empty_model

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
)
TEMPLATES = "additional_chat_templates"  # the folder of those beside the default, as Transformers has it
WEIGHTS_INDEX = "*.index.json"
OF_QUANTISED = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)
MAX_SHARD_SIZE = "5GB"


def save_model_files(recipe: Recipe, folder: RunFolder) -> None:
    """Copies what is not weights from the student's original folder into the run's.

    Of an adapter, what its base model has, but tokenizer and template as the processor takes them in training: the
    adapter's own where it has some.
    """
    folder.model_files.mkdir(exist_ok=True)
    (base, revision), *adapters = lineage(recipe.student.model, recipe.student.revision)
    _copy_small_files(_local(base, revision), folder.model_files)
    for name, _ in adapters:
        for path in _small_files(Path(name)):
            if path.name.startswith(TOKENIZER_FILES):
                shutil.copyfile(path, folder.model_files / path.name)
    if adapters:
        processor = load_processor(recipe.student.model, revision=recipe.student.revision)
        _write_template(folder.model_files, chat_template(processor))
    if recipe.data.chat_template is not None:
        _write_template(folder.model_files, read_template(recipe.data.chat_template))


def _write_template(folder: Path, template: str) -> None:
    """In place of the model's own, wherever that lies: Transformers looks into the older places first."""
    (folder / LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    settings = _settings(folder / PROCESSOR_NAME)
    if settings.pop("chat_template", None) is not None:
        write_json(folder / PROCESSOR_NAME, settings)
    write_text(folder / CHAT_TEMPLATE_FILE, template)


def _bound_pictures(folder: Path, data: DataConfig, model: str) -> None:
    """Writes the data's bounds into the folder, so that its pictures have the size of training for all who open it.

    model  folder with the same files as they were; training has opened these with the bounds
    """
    asked = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    bounds: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if not bounds:
        return
    size = load_processor(model, **bounds).image_processor.to_dict().get("size")
    for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
        settings = _settings(folder / name)
        images = settings.get("image_processor") if name == PROCESSOR_NAME else settings
        if images:
            images |= bounds | ({"size": size} if "size" in images else {})
            write_json(folder / name, settings)


def _settings(path: Path) -> dict[str, Any]:
    """Of a file that the processor was opened from; empty without one."""
    settings: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return settings


def _copy_small_files(source: Path, out: Path, *, without: tuple[str, ...] = ()) -> None:
    for path in _small_files(source):
        name = path.relative_to(source)
        if str(name) not in without:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def _local(name: str, revision: str | None) -> Path:
    """A folder with the model's small files."""
    if Path(name).is_dir():
        return Path(name)
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(SMALL_FILES), ignore_patterns=[WEIGHTS_INDEX]
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {name}: its files cannot be fetched: {error}") from error
    return Path(found)


def choose_checkpoint(folder: RunFolder, *, step: int | None = None, best: bool = False) -> Checkpoint:
    """The one of that step, the best one, or by default the newest.

    Raises   CheckpointError  when there is none, or the best is asked for and none was validated
    """
    if step is not None:
        return folder.checkpoints.at(step)
    found = folder.checkpoints.latest()
    if found is None:
        raise CheckpointError(
            f"{folder.path}: no checkpoint there; give the folder of a run that has saved one"
        )
    if not best:
        return found
    found = folder.checkpoints.best()
    if found is None:
        raise CheckpointError(
            f"{folder.path}: none of its checkpoints was validated, so none is the best. Leave --best out for the "
            "newest, or choose one with --step"
        )
    return found


def export_checkpoint(
    folder: RunFolder, checkpoint: Checkpoint, out: Path, *, merge: bool | None = None
) -> Path:
    """Writes ``out``, whole or not at all; the weights keep the dtype they were trained in.

    An export that is there is replaced; anything else is not.

    merge  adapters into the weights; by default as the run's recipe says, and where the student began from an
           adapter itself: a chain of them is opened by nothing else
    """
    folder.require_as_written()
    recipe = load_recipe(folder.recipe)
    lora = recipe.student.lora
    if merge and lora is None:
        raise RecipeError(f"{folder.path}: the run has no adapters to merge; its export is a whole model")
    target = out.resolve()
    require_replaceable(target, folder)
    if merge is None:
        merge = lora is not None and (lora.merge or adapters.is_adapter(recipe.student.model))
    model = empty_model(load_config(str(folder.model_files)), recipe.student)
    if lora is not None:  # which also depend on what is frozen
        choose_trained(model, recipe.student, seed=recipe.run.seed)
    model.to_empty(device="cpu")
    model.tie_weights()  # which to_empty has undone
    load(checkpoint, student_state(model))
    remove_left(target)
    partial = target.with_name(temporary_name(target.name))
    with _removed_where_it_cannot_be_written(partial, target):
        _write(model, recipe, folder, checkpoint, partial, target, merge=merge)
        _replace_folder(partial, target)
    return out


@contextmanager
def _removed_where_it_cannot_be_written(partial: Path, target: Path) -> Iterator[None]:
    """Raises   FileError  in place of what a full disk makes of each library; an earlier export stays as it is"""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"export {target}: it cannot be written: {shortened(reason)}. Make room, or choose another --out; the "
            "checkpoint is whole"
        ) from error


def _write(
    model: PreTrainedModel,
    recipe: Recipe,
    folder: RunFolder,
    checkpoint: Checkpoint,
    partial: Path,
    target: Path,
    *,
    merge: bool,
) -> None:
    base = base_of_export(recipe, folder)
    if recipe.student.lora is not None and not merge:
        save_adapters(model, partial, base=base, revision=recipe.student.revision)
    else:
        merge_adapters(model)
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    # A model's configuration is written above; an adapter's folder has none, or it would pass for a model.
    _copy_small_files(folder.model_files, partial, without=("config.json",))
    _bound_pictures(partial, recipe.data, str(folder.model_files))
    own = None if recipe.data.chat_template is None else str(folder.model_files / CHAT_TEMPLATE_FILE)
    processor = open_processor(str(folder.model_files), recipe.data.model_copy(update={"chat_template": own}))
    stop_at(processor.end_of_turn, partial / GENERATION)
    facts = {
        "run": str(folder.path),
        "step": checkpoint.facts.step,
        "recipe": dump_recipe(recipe),
        "sources": read_sources(folder),
        **environment(),
        "sha256": hashes(partial),
    }
    if adapters.is_adapter(str(partial)) and is_local(base):
        facts[adapters.BASE_FROM_HERE] = os.path.relpath(base, target)
    write_json(partial / PROVENANCE, vouched(facts))
    write_text(partial / CARD, model_card(facts, folder, is_adapter=adapters.is_adapter(str(partial))))


def base_of_export(recipe: Recipe, folder: RunFolder) -> str:
    """Name or absolute path of the student's model: a relative one means another place in another folder."""
    name = recipe.student.model
    if is_local(name):
        return str(Path(name).absolute())
    return str(read_sources(folder).get("student", {}).get("path") or name)


def stop_at(end_of_turn: int, path: Path) -> None:
    """Makes ``generate`` end at the token that ends the answers the student has learned; all else stays.

    A base that was never taught to answer ends at the end of its documents alone, and its student would go on.
    """
    settings = {}
    if path.exists():
        try:
            settings = json.loads(path.read_bytes())
            before = settings.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise RecipeError(
                f"{path.name} of the student's model: not JSON ({error}). Fetch it again"
            ) from error
    else:
        before = None
    ends = before if isinstance(before, list) else [] if before is None else [before]
    if end_of_turn not in ends:
        settings["eos_token_id"] = [*ends, end_of_turn] if ends else end_of_turn
        write_json(path, settings)


def require_replaceable(out: Path, folder: RunFolder) -> None:
    """Raises   RecipeError  when what is there was not exported by this project, or another run's is kept there"""
    is_own = out == folder.export.resolve()
    if not is_own and out.name == folder.export.name and (out.parent / folder.recipe.name).exists():
        raise RecipeError(f"{out}: the place of another run's student. Give another --out")
    if not out.exists():
        require_in_no_cache(out)
    is_ours = (out / PROVENANCE).exists() or is_own
    if out.exists() and not is_ours and not (out.is_dir() and not any(out.iterdir())):
        raise RecipeError(
            f"{out}: something is there that is no export of a run. Give another --out, or move it away"
        )


def _small_files(folder: Path) -> list[Path]:
    """But for what belongs to weights that are not copied: their index, an adapter's settings, their origin."""
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    found |= set(folder.glob(f"{TEMPLATES}/*.jinja"))
    others = (adapters.SETTINGS, PROVENANCE, *OF_QUANTISED)
    return sorted(found - {*folder.glob(WEIGHTS_INDEX), *(folder / name for name in others)})


def _replace_folder(new: Path, out: Path) -> None:
    """Where another process does so as well, the later one wins."""
    while True:
        try:
            new.rename(out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = out.with_name(temporary_name(out.name))
        with suppress(FileNotFoundError):
            out.rename(old)
        shutil.rmtree(old, ignore_errors=True)
