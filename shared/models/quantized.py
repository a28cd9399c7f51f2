"""Models whose weights are stored in fewer bits, with scales beside them: FP8, AWQ, GPTQ, bitsandbytes and others.

    method_of(config)                       # "fp8", or None of an ordinary model
    require_library(name, config)           # a message that names the package, where one is missing
    config = without_quantization(config)   # of the ordinary model that it becomes

A teacher that one device holds runs as it is stored, where the method's library runs.  What is trained, sharded or
merged with an adapter is dequantised as it is loaded: a scale is a tensor of its own, and weights without theirs are
silently thousands of times too large.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, AutoQuantizationConfig

from shared.errors import RecipeError, shortened

KEY = "quantization_config"
# Import name -> what pip calls it.
PACKAGES = {
    "fp8": {"accelerate": "accelerate"},
    "awq": {"gptqmodel": "gptqmodel", "accelerate": "accelerate"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "torchao": {"torchao": "torchao"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
}
ORDINARY = (torch.float32, torch.bfloat16, torch.float16)


def method_of(config: PretrainedConfig) -> str | None:
    """As Transformers names it; None of a model that is not quantised."""
    settings = _settings(config)
    if not settings:
        return None
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # as older folders have it
    return str(getattr(method, "value", method))


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """Empty of a model that is not quantised."""
    found = getattr(config, KEY, None) or getattr(config.get_text_config(), KEY, None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that says nothing of it: of a model whose tensors are ordinary."""
    if method_of(config) is None:
        return config
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if getattr(part, KEY, None) is not None:
            delattr(part, KEY)
    return plain


def require_library(name: str, config: PretrainedConfig) -> None:
    """Raises   RecipeError  when the package that reads the model's weights is not installed, or nothing knows them

    Transformers passes over a method that it does not know, scales and all.
    """
    method = method_of(config)
    if (
        method is not None
        and f"{method}_4bit" not in AUTO_QUANTIZER_MAPPING
        and method not in AUTO_QUANTIZER_MAPPING
    ):
        raise RecipeError(
            f"model {name}: its weights are quantised ({shortened(method)}), which this version of Transformers does "
            "not know. Give the folder of the model before it was quantised"
        )
    missing = [pip for package, pip in PACKAGES.get(method or "", {}).items() if not _is_installed(package)]
    if missing:
        raise RecipeError(
            f"model {name}: its weights are quantised ({method}), which needs {' and '.join(missing)}. Run "
            f"`pip install {' '.join(missing)}`, or give the folder of the model before it was quantised"
        )
    if method is not None and method not in PACKAGES:
        _require_environment(name, config, method)


def _require_environment(name: str, config: PretrainedConfig, method: str) -> None:
    """As Transformers itself asks for packages; whatever else it finds is said where the model is loaded."""
    try:
        AutoHfQuantizer.from_config(_settings(config), pre_quantized=True).validate_environment(
            device_map=None
        )
    except ImportError as error:
        raise RecipeError(
            f"model {name}: its weights are quantised ({method}), and a package is missing: {shortened(str(error))}"
        ) from error
    except Exception:  # each library has its own, as where there is no GPU
        return


def what_becomes_of_it(config: PretrainedConfig, *, dequantize: bool) -> str | None:
    """For people; None of an ordinary model."""
    method = method_of(config)
    if method is None:
        return None
    if dequantize:
        return f"its weights are quantised ({method}): they are made ordinary ones as they are loaded"
    return f"its weights are quantised ({method}), and run as they are stored where its library can"


def to_be_dequantized(name: str, config: PretrainedConfig) -> PretrainedConfig:
    """A configuration that makes Transformers dequantise as it loads, where the method can."""
    asked = copy.deepcopy(config)
    settings = getattr(asked, KEY, None)
    settings = settings if isinstance(settings, dict) else settings.to_dict() if settings else {}
    try:
        known: Any = type(AutoQuantizationConfig.from_dict(settings))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model {name}: unknown quantization_config: {shortened(str(error))}") from error
    if "dequantize" in inspect.signature(known.__init__).parameters:
        asked.quantization_config = settings | {"dequantize": True}
    return asked


def dequantized(
    name: str, model: PreTrainedModel, ordinary: PreTrainedModel, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with ordinary weights in ``dtype``, which says nothing of its origin.

    ordinary  the same without quantisation; its values do not count, it may be on the meta device
    Raises   RecipeError  when the method cannot, or leaves anything that is not in the ordinary model
    """
    method = str(method_of(model.config))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    try:
        if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
            model = quantizer.dequantize(model, dtype=dtype)
    except Exception as error:  # NotImplementedError, and what libraries raise where their kernels do not run
        raise _cannot(name, method, str(error) or type(error).__name__) from error
    if (odd := first_difference(model, ordinary)) is not None:
        raise _cannot(name, method, f"{odd} is left")
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.config = without_quantization(model.config)
    nn.Module.to(model, dtype)
    return model


def first_difference(model: nn.Module, ordinary: nn.Module) -> str | None:
    """The first tensor of a model that an ordinary one of its kind does not have: packed, or a scale."""
    wanted = ordinary.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            return f"{name} of shape {tuple(tensor.shape)}"
        if wanted[name].dtype in ORDINARY and tensor.dtype not in ORDINARY:
            return f"{name} of type {tensor.dtype}"
    return None


def _cannot(name: str, method: str, reason: str) -> RecipeError:
    return RecipeError(
        f"model {name}: its weights are quantised ({method}) and cannot be made ordinary ones: "
        f"{shortened(reason)}. They are needed to train, to shard or to merge it: give the folder of the model "
        "before it was quantised"
    )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what a dotted name lies in
        return False
