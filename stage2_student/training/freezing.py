"""Which parts of a student are trained.

A vision-language model has four parts: vision tower, audio tower, connector (what maps a tower's features
into the language model) and language model with its head.  Families name and nest them differently; in
Qwen3-VL and Qwen3.5 the connector (``visual.merger``) lies inside the vision tower and is still a part of its
own here: ``freeze: {vision: true}`` leaves it to be trained.  What lies in no part, as LLaVA-NeXT's ``image_newline``
beside all modules, belongs to the connector.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from shared.errors import RecipeError
from shared.recipes import FreezeConfig

VISION = (
    "visual",
    "vision_tower",
    "vision_model",
    "video_tower",
    "vision_encoder",
    "image_tower",
    "vision_backbone",
)
AUDIO = ("audio_tower", "audio_encoder", "speech_encoder", "audio_model")
CONNECTOR = (
    *("multi_modal_projector", "merger", "deepstack_merger_list", "connector", "aligner", "mm_projector"),
    *("modality_projection", "vision_projection", "image_projection", "language_projection", "qformer"),
    *("embed_vision", "embed_audio", "visual_embeddings_table"),
)
LANGUAGE = ("language_model", "text_model")
SUBCONFIGS = {"vision": ("vision_config",), "audio": ("audio_config", "speech_config")}


def freeze(model: PreTrainedModel, config: FreezeConfig) -> None:
    """Sets ``requires_grad`` of every parameter.

    Raises   RecipeError  when a switch matches nothing though the model has such a part, and when nothing is
                          left to train.
    """
    parts = parameters_of_parts(model)
    with_own_switch = {id(parameter) for parameter in parts["connector"]}
    for name, parameters in parts.items():
        wanted = getattr(config, name)
        if wanted and not parameters and _should_have(model, name):
            raise RecipeError(
                f"student.freeze.{name}: found no such part in {type(model).__name__}, whose parts are "
                f"called {', '.join(name for name, _ in model.base_model.named_children())}"
            )
        for parameter in parameters:
            if name == "connector" or id(parameter) not in with_own_switch:
                parameter.requires_grad_(not wanted)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("student.freeze: all parts are frozen; nothing is left to train")


def parameters_of_parts(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Each parameter of the model in one part at least, each once in a part; a connector may lie in a tower."""
    parts = {name: _parameters(modules) for name, modules in find_parts(model).items()}
    covered = {id(parameter) for parameters in parts.values() for parameter in parameters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in covered]
    parts["connector" if parts["language"] else "language"] += rest
    return parts


def find_parts(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Modules of each part, outermost ones only; a part that the model lacks is an empty list."""
    parts = {
        "vision": _outermost(model, VISION),
        "audio": _outermost(model, AUDIO),
        "connector": _outermost(model, CONNECTOR),
        "language": _outermost(model, LANGUAGE),
    }
    head = model.get_output_embeddings()
    if parts["language"] and head is not None:
        parts["language"].append(head)
    return parts


def _outermost(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.rpartition(".")[2] in names and not inside:
            found[path] = module
    return list(found.values())


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    found = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return list(found.values())


def _should_have(model: PreTrainedModel, name: str) -> bool:
    if name not in SUBCONFIGS:
        return True
    return any(getattr(model.config, key, None) is not None for key in SUBCONFIGS[name])
