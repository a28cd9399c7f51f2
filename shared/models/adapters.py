"""Folders that hold a low-rank adapter instead of a model: what it belongs to, and the two made one.

Wherever a model's name is taken, such a folder stands for its base model with the adapter merged into it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shared.errors import RecipeError
from shared.regular_files import refuse_irregular_members

SETTINGS = "adapter_config.json"
PROVENANCE = "teachonce.json"  # in every export of ours: of which run, and the SHA-256 of its files
BASE_FROM_HERE = "base_from_here"  # in it: the way from an adapter's folder to its base model's


def is_adapter(name: str) -> bool:
    """Whether a model's name is a folder of an adapter, as peft writes them."""
    return (Path(name) / SETTINGS).exists()


def base_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model; of a whole model, its own.

    Where both were moved together, the base is found by the way from one to the other, which exports of ours note.

    Raises   RecipeError  when the adapter's settings do not say
    """
    if not is_adapter(name):
        return name, revision
    path = Path(name) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict) or not settings.get("base_model_name_or_path"):
        raise RecipeError(
            f"{path}: base_model_name_or_path is missing; name the model it was trained on there"
        )
    base = str(settings["base_model_name_or_path"])
    if Path(base).is_absolute() and not Path(base).exists():
        base = _moved_with(Path(name)) or base
    return base, settings.get("revision")


def _moved_with(folder: Path) -> str | None:
    try:
        noted = json.loads((folder / PROVENANCE).read_bytes())[BASE_FROM_HERE]
        found = Path(os.path.normpath(folder.absolute() / str(noted)))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return str(found) if (found / "config.json").exists() or is_adapter(str(found)) else None


def lineage(name: str, revision: str | None) -> list[tuple[str, str | None]]:
    """The whole model, then the adapters that were trained on top of each other, up to the one named.

    Raises   RecipeError    when an adapter's settings do not say what it belongs to, or lead in a circle
             NotAFileError  when something in a model's folder is a pipe, a device or a socket
    """
    if Path(name).is_dir():
        refuse_irregular_members(name)
    found = [(name, revision)]
    while is_adapter(found[0][0]):
        base = base_of(*found[0])
        if base in found:
            raise RecipeError(f"{base[0]}: an adapter that is, over others, its own base model")
        found.insert(0, base)
    return found


def merged(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The base model with the adapter's products added to its weights.

    Raises   RecipeError  when peft is not installed, or the adapter is not of this model
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(f"model {folder} is an adapter. Run `pip install 'teachonce[lora]'`, or merge it")
    import peft

    try:
        model: Any = peft.PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(f"model {folder}: the adapter cannot be loaded: {reason}") from error
    return model.merge_and_unload(safe_merge=True).eval()
