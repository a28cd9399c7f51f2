"""Low-rank adapters: the student's own weights stay, small matrices beside its linear layers are trained.

peft puts its layers into the model, in place, so that the model keeps its class, and with it everything that
is known about its parts.  Alone the adapters are trained: towers, connector and head are frozen with the rest.
Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from shared.errors import RecipeError
from shared.models.plans import Plan
from shared.recipes import LoraConfig
from stage2_student.training.freezing import find_parts

WEIGHTS_FILE = "adapter_model.safetensors"
SPLIT_FACTORS = {"colwise": "lora_B", "packed_colwise": "lora_B", "rowwise": "lora_A"}  # by a layer's style
PREFIX = (
    "base_model.model."  # of names in an adapter's file: peft's wrapper around the model, which is not here
)


def add_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Puts adapters into the model; all else is frozen.  On the meta device they stay there.

    What is frozen before gets none, though it has a target's name, as layers of a vision tower do.

    Holds    the model's outputs are as before: one factor of each adapter is zero
    Raises   RecipeError  when peft is not installed, or a target is no linear layer, or no parameter, of the model,
                          or lies in frozen parts alone
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("student.lora: peft is not installed. Run `pip install 'teachonce[lora]'`")
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=config.dropout,
        target_modules=_layers(model, config),
        target_parameters=_named_parameters(model, config),
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, low_cpu_mem_usage=device.type == "meta")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)  # peft makes them fp32 beside bf16 weights


def beside_adapters(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan of the model before it had adapters, which have taken their layers' names.

    Of an adapter's factors, the one at the side on which its layer is split is split in the same way.
    """
    if not hasattr(model, "peft_config"):
        return plan
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    styles: dict[str, str] = {}
    for name, style in plan.tensor.items():
        owner, _, leaf = name.rpartition(".")
        if name in adapted:
            styles[f"{name}.base_layer"] = style
            if style in SPLIT_FACTORS:
                factor = f"{name}.{SPLIT_FACTORS[style]}.default"
                styles |= {f"{factor}.weight": style, factor: style}
        elif owner in adapted:
            styles[f"{owner}.base_layer.{leaf}"] = style
        else:
            styles[name] = style
    return replace(plan, tensor=styles)


def _is_linear(module: nn.Module) -> bool:
    """Not what only stores its weight as a linear layer does, as Llama 4's router: it returns something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def out_of_reach(model: PreTrainedModel) -> dict[str, int]:
    """What of the language model has no adapter and is in no linear layer, as experts are: elements by name.

    Names are those that ``target_parameters`` takes, one for all layers; small ones, below 1 % of the language model,
    are left out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = [part for part in find_parts(model)["language"] if part is not model.get_output_embeddings()]
    known = (nn.Linear, nn.Embedding, BaseTunerLayer)
    adapted = {
        id(module.get_param())  # type: ignore[operator]
        for part in parts
        for module in part.modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_param")
    }
    found: dict[str, int] = {}
    for part in parts:
        for path, module in part.named_modules():
            if isinstance(module, known):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and id(parameter) not in adapted:
                    key = f"{_without_layer(path)}.{name}"
                    found[key] = found.get(key, 0) + parameter.numel()
    total = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return {name: number for name, number in found.items() if number * 100 >= total}


def _without_layer(path: str) -> str:
    """``layers.3.mlp.experts`` and all that peft has wrapped around it as ``mlp.experts``."""
    return re.sub(r"^.*\.\d+\.", "", path.replace(".base_layer", ""))


def _named_parameters(model: PreTrainedModel, config: LoraConfig) -> list[str] | None:
    """Full names of the parameters that get an adapter of their own."""
    if config.target_parameters is None:
        return None
    there = {
        f"{path}.{name}": parameter.ndim
        for path, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
    }
    chosen: set[str] = set()
    for target in config.target_parameters:
        found = {name for name in there if name == target or name.endswith(f".{target}")}
        if not found or any(there[name] not in (2, 3) for name in found):
            known = sorted({_without_layer(name) for name, ndim in there.items() if ndim in (2, 3)})
            raise RecipeError(
                f"student.lora.target_parameters: {target!r} is no matrix of {type(model).__name__} outside of its "
                f"linear layers, which are {', '.join(known)}"
            )
        chosen |= _trained(model, found, "", key="target_parameters", target=target)
    return sorted(chosen)


def _layers(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises   RecipeError  for a target that is no linear layer, or is the head
    """
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    if config.target_modules is None:
        inside = {id(module) for part in find_parts(model)["language"] for module in part.modules()}
        return sorted(
            name
            for name, module in model.named_modules()
            if name in linear and id(module) in inside and module is not head
        )
    chosen: set[str] = set()
    for target in config.target_modules:
        found = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not found:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise RecipeError(
                f"student.lora.target_modules: {target!r} is no linear layer of {type(model).__name__}, whose "
                f"linear layers are called {kinds}"
            )
        if any(model.get_submodule(name) is head for name in found):
            raise RecipeError(
                f"student.lora.target_modules: {target!r} is the head of {type(model).__name__}, which can have no "
                "adapter: the loss reads the head's weight itself"
            )
        chosen |= _trained(model, found, ".weight", key="target_modules", target=target)
    return sorted(chosen)


def _trained(model: PreTrainedModel, names: set[str], leaf: str, *, key: str, target: str) -> set[str]:
    """Those that no switch of ``student.freeze`` has frozen; ``leaf`` is what makes parameters of the names."""
    found = {name for name in names if model.get_parameter(name + leaf).requires_grad}
    if not found:
        raise RecipeError(
            f"student.lora.{key}: {target!r} lies in parts alone that student.freeze freezes. Leave that switch out, "
            "or the target: without its adapters a part does not change"
        )
    return found


def save_adapters(model: PreTrainedModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Writes what ``PeftModel.from_pretrained(base_model, folder)`` opens."""
    import peft

    folder.mkdir(parents=True)
    state = peft.get_peft_model_state_dict(model)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    settings: Any = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base, revision
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def merge_adapters(model: PreTrainedModel) -> None:
    """Adds the adapters to the weights beside them, and takes them out of the model again.

    One parameter's adapter may lie around another's, in a module that has several.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, one) for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)]
    for _, module in wrapped:
        module.merge(safe_merge=True)
    for name, module in wrapped:
        if ".base_layer" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
