"""A vision-language model as two parts: a body that gives hidden states and a head that makes logits of them.

Both stages call the body once on whole sequences and the head on answer positions only, a chunk at a time, so
the logits of a batch never exist.  ``split`` finds the parts in any ``AutoModelForImageTextToText``;
``shared.model_check`` proves on real input that they are all there is to the model's own logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_outputs import BaseModelOutput

from shared.errors import RecipeError, shortened
from shared.models.adapters import base_of, is_adapter, lineage, merged
from shared.models.cross_attention import keep_rows_apart
from shared.models.packing import packed_arguments
from shared.models.quantized import (
    dequantized,
    method_of,
    require_library,
    to_be_dequantized,
    without_quantization,
)
from shared.models.weight_files import require_whole_weights
from shared.places import is_local, require_hub_asked_once, require_no_typo, why

# What the forward of a family's own class multiplies its logits by, from the settings of its text model.  The others
# multiply by nothing, whatever these settings say: LLaVA-NeXT does not divide by the ``logits_scaling`` of a Granite
# inside, nor Aya Vision multiply by the ``logit_scale`` of its Cohere 2.
SCALES: dict[str, Callable[[Any], float]] = {
    "cohere_compass": lambda text: text.logit_scale or 1.0,
    "granite4_vision": lambda text: 1.0 / text.logits_scaling,
    "granite_docling": lambda text: 1.0 / text.logits_scaling,
    "hyperclovax_vision_v2": lambda text: text.logits_scaling,
    "inkling_mm_model": lambda text: 1.0 / text.logits_mup_width_multiplier,
    "muse_glimmer": lambda text: text.output_multiplier,
    "muse_spark": lambda text: text.output_multiplier,
}
LEFT_OUT: dict[str, Callable[[Any], float]] = {  # of text models, when they stand alone
    "cohere": lambda text: text.logit_scale or 1.0,
    "cohere2": lambda text: text.logit_scale or 1.0,
    "granite": lambda text: 1.0 / (text.logits_scaling or 1.0),
    "granitemoehybrid": lambda text: 1.0 / (text.logits_scaling or 1.0),
    "hyperclovax": lambda text: text.logits_scaling,
}


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: ``softcap * tanh(scale * (h W^T + b) / softcap)``."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight_VD(self) -> Tensor:
        return self.linear.weight

    @property
    def bias_V(self) -> Tensor | None:
        return self.linear.bias

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Shapes   hidden_ND (N, D); returns (N, V) of the same dtype."""
        logits_NV = self.linear(hidden_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration; an adapter's folder stands for its base model.

    Raises   RecipeError  when there is no model of that name, or it is not a decoder-only VLM.
    """
    name, revision = lineage(name, revision)[0]
    require_no_typo(name, what=f"model {name}", error=RecipeError)
    if not is_local(name):
        require_hub_asked_once()
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of any type, where a setting in its files is of another kind
        reason = shortened(why(name, error))
        raise RecipeError(
            f"model {name}: cannot be opened: {reason}. Give a Hub name or a folder with config.json"
        ) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping or config.is_encoder_decoder:
        raise RecipeError(
            f"model {name}: {config.model_type!r} is not a decoder-only image-text-to-text model of transformers"
        )
    _ask_for_nothing_more(config)
    return config


def _ask_for_nothing_more(config: PretrainedConfig) -> None:
    """Undoes what a config.json asks of every forward: results as a tuple, and attentions, which sdpa does not give.

    Transformers refuses to save such a model.
    """
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            _ask_for_nothing_more(part)


def load_vlm(
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    attn_implementation: str | None,
    dequantize: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model with its weights, on the CPU, in evaluation mode; an adapter's folder gives it with them merged.

    dequantize  quantised weights become ordinary ones; by default they stay as they are stored
    device      where quantised weights that stay so are put, as their libraries ask for

    Raises   RecipeError  when it cannot be opened, or its files lack weights, or a package is missing for them
    """
    config = load_config(name, revision)
    require_whole_weights(name, revision)
    if is_adapter(name):
        base, its_revision = base_of(name, revision)
        whole = load_vlm(
            base,
            revision=its_revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            dequantize=True,
        )
        return merged(whole, name)
    options: dict[str, Any] = {"config": config}
    if method := method_of(config):
        require_library(name, config)
        if dequantize:
            options["config"] = to_be_dequantized(name, config)
        elif device is not None and device.type != "cpu":
            options["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with names and shapes
            trust_remote_code=False,  # not None: at a terminal Transformers would ask
            **options,
        )
    except Exception as error:  # each library has its own, and settings of another kind end in any
        what = (
            f"its weights are quantised ({method}) and cannot be loaded here"
            if method
            else "cannot be loaded"
        )
        raise RecipeError(f"model {name}: {what}: {shortened(why(name, error))}") from error
    model, info = loaded
    for weight, in_files, needed in sorted(info["mismatched_keys"])[:1]:
        raise RecipeError(
            f"model {name}: its files do not fit its config.json: {weight} is {tuple(in_files)} in the files, and "
            f"{tuple(needed)} is needed. Fetch both again, from one place"
        )
    if info["missing_keys"]:
        first = sorted(map(str, info["missing_keys"]))[0]
        raise RecipeError(
            f"model {name}: its files lack weights, {first} among them, which would be random. "
            "Give the folder of the whole model"
        )
    if not method and info["unexpected_keys"] and os.environ.get("RANK", "0") == "0":
        click.echo(f"note: model {name}: {_unused(model, info['unexpected_keys'])}", err=True)
    if method and dequantize:
        ordinary = empty_vlm(config, dtype=dtype, attn_implementation=attn_implementation)
        model = dequantized(name, model, ordinary, dtype=dtype)
    keep_rows_apart(model)
    return model.eval()


def _unused(model: PreTrainedModel, weights: Collection[str]) -> str:
    return (
        f"{len(weights)} weight(s) of its files are not used, {min(weights)} among them: {type(model).__name__} with "
        "this config.json has no place for them. Are both of one model?"
    )


def empty_vlm(
    config: PretrainedConfig, *, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """The model's shape without memory behind it, on the meta device; of a quantised one the ordinary model's.

    Holds    its tensors have the types that ``load_vlm`` gives them
    Raises   RecipeError  when this model cannot be made so, as with an attention that is not installed
    """
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                without_quantization(config), dtype=dtype, attn_implementation=attn_implementation
            )
    except Exception as error:  # of any type: settings that do not fit together, packages that are missing
        reason = shortened(str(error).split("\n")[0])
        raise RecipeError(f"model of type {config.model_type}: cannot be made: {reason}") from error
    _keep_in_fp32(model, dtype)
    keep_rows_apart(model)
    return model


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What a class wants in fp32 beside narrower weights; ``from_pretrained`` alone heeds it.

    A router's correction, of some units, decides between experts by differences that bf16 rounds away.
    """
    if not (plan := model._get_dtype_plan(dtype)):
        return
    kept, _, _ = build_glob_alternation([*plan])
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and kept.search(f"{path}.{name}"):
                    tensor.data = tensor.data.float()


def split(model: PreTrainedModel) -> tuple[nn.Module, Head]:
    """The body and the head.

    Raises   RecipeError  when the model has no such parts.
    """
    body, linear = model.base_model, model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise RecipeError(
            f"model class {type(model).__name__}: found no body with a linear head on top of it"
        )
    text = model.config.get_text_config()
    scale = SCALES.get(model.config.model_type, lambda _: 1.0)(text)
    head = Head(linear, scale=float(scale), softcap=getattr(text, "final_logit_softcapping", None))
    return (WithoutHead(model) if body is model else body), head


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model was made for; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def scale_left_out(config: PretrainedConfig) -> str | None:
    """A note on a model whose class does not multiply its logits by what its text model alone does."""
    text = config.get_text_config()
    scale = LEFT_OUT.get(text.model_type, lambda _: 1.0)(text)
    if config.model_type in SCALES or scale == 1.0:
        return None
    return (
        f"its text model alone ({text.model_type}) multiplies its logits by {scale:g}, and {config.model_type} of "
        "Transformers does not. Its probabilities are taken as Transformers computes them; a temperature of "
        f"{1 / scale:g}, of cache and loss, gives those that it was made with"
    )


class WithoutHead(nn.Module):
    """The body of a model that has none apart, as Llama 4: the whole, its head an identity meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> BaseModelOutput:
        head = self.model.get_output_embeddings()
        self.model.set_output_embeddings(nn.Identity())
        try:
            return BaseModelOutput(last_hidden_state=self.model(**inputs).logits)
        finally:
            self.model.set_output_embeddings(head)


def num_logit_ids(
    model: PreTrainedModel, num_token_ids: int, *, num_answer_ids: int | None = None, what: str
) -> int:
    """How many of the tokenizer's ids have a logit: all, but for pictures' placeholders behind the head's last id.

    num_answer_ids  one more than the largest id that an answer may hold; None: ``num_token_ids``

    Raises   RecipeError  when an answer may hold ids for which the model has no logit
    """
    width = split(model)[1].weight_VD.shape[0]
    needed = num_token_ids if num_answer_ids is None else num_answer_ids
    if width < needed:
        raise RecipeError(
            f"{what}: its head is {width} wide, its tokenizer has {needed} ids. They do not belong together"
        )
    return min(width, num_token_ids)


def last_hidden_states(body: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states (B, S, D) that the head takes; of packed examples (1, S, D)."""
    return body(**packed_arguments(body, inputs), use_cache=False, return_dict=True).last_hidden_state


def in_dtype_of(head: Head, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With floats, which are pixels, in the dtype that the model computes in: some families need them so."""
    dtype = head.weight_VD.dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def hidden_and_router_logits(body: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As ``last_hidden_states``; and of each layer with experts (B * S, experts)."""
    arguments = packed_arguments(body, inputs)
    outputs = body(**arguments, use_cache=False, return_dict=True, output_router_logits=True)
    return outputs.last_hidden_state, outputs.router_logits
