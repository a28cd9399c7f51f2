"""Folders that hold a low-rank adapter instead of a model: what it belongs to, and the two made one.

Wherever a model's name is taken, such a folder stands for its base model with the adapter merged into it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shared.errors import RecipeError
from shared.regular_files import refuse_irregular_members

SETTINGS = "adapter_config.json"


def is_adapter(name: str) -> bool:
    """Whether a model's name is a folder of an adapter, as peft writes them."""
    return (Path(name) / SETTINGS).exists()


def base_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model; of a whole model, its own.

    Raises   RecipeError  when the adapter's settings do not say
    """
    if not is_adapter(name):
        return name, revision
    path = Path(name) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict) or not settings.get("base_model_name_or_path"):
        raise RecipeError(
            f"{path}: base_model_name_or_path is missing; name the model it was trained on there"
        )
    return settings["base_model_name_or_path"], settings.get("revision")


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
