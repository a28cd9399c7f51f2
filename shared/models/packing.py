"""Examples one behind the other in one row: no padding, where a model keeps them apart.

    require_packing(model)                       # by name: which models are known to
    hidden = body(**packed_arguments(body, inputs))

What tells a model where an example begins are positions that start from 0 again, beside no mask of padding:
Transformers then lets no token attend to another example (``masking_utils``, and flash attention's own lengths).
That holds for attention alone.  Layers that pass a state on, such as linear attention, take it along unless their
kernels are told otherwise; without these kernels they do it silently.  So only known models are packed, and
``shared.model_check`` proves it of each on real input.

Legend: B examples, S tokens of all of them, L tokens of the longest.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from shared.errors import RecipeError

# Tried, with and without pictures (tests/test_packing.py): by model_type, and that of the language model inside.
KNOWN = {
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("llava", "llava_next", "llava_onevision", "internvl", "mistral3", "idefics3", "smolvlm"),
}
KNOWN_TEXTS = {"llama", "mistral", "qwen2", "qwen3"}
# Of linear attention: module, package.
KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


def is_packed(inputs: Mapping[str, Tensor]) -> bool:
    """Whether a batch was made by ``collation.packed``."""
    return "position_ids" in inputs and "attention_mask" not in inputs


def require_packing(model: PreTrainedModel) -> None:
    """Raises   RecipeError  when the model is not known to keep packed examples apart, or lacks kernels for it"""
    what, text = f"optimization.packing: {type(model).__name__}", model.config.get_text_config()
    kind = model.config.model_type
    if kind not in KNOWN or (text.model_type not in KNOWN_TEXTS and not text.model_type.startswith(kind)):
        raise RecipeError(
            f"{what} ({kind}, {text.model_type}) is not known to keep examples apart that follow each other in one "
            f"row. Set it to false: rows are then padded. Known are {', '.join(sorted(KNOWN))}"
        )
    lacking = [package for module, package in KERNELS.items() if importlib.util.find_spec(module) is None]
    if _has_linear_attention(model) and lacking:
        raise RecipeError(
            f"{what} has linear attention, which passes one example's state on to the next one unless its kernels "
            f"are told where it begins; {' and '.join(lacking)} cannot be found. Install what is missing, or set it "
            "to false"
        )


def packed_arguments(body: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with what else this model needs to keep packed examples apart; others as they are.

    Shapes   position_ids (1, S), from 0 in each example; returns (4, 1, S) of it where the model has three
             positions for each token: in the text, and in time, height and width
    """
    if not is_packed(inputs):
        return dict(inputs)
    arguments, text_1S = dict(inputs), inputs["position_ids"]
    if hasattr(body, "get_rope_index"):
        arguments["position_ids"] = torch.cat([text_1S[None], _positions(body, inputs)])
    if _has_linear_attention(body):
        arguments |= _for_kernels(text_1S)
    return arguments


def examples_of(position_ids_1S: Tensor) -> Tensor:
    """(S,) int64: which example of a packed row each token belongs to, from 0."""
    return (position_ids_1S[0] == 0).cumsum(0) - 1


def _positions(body: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(3, 1, S), as the model counts them: in each example alone."""
    lengths = examples_of(inputs["position_ids"]).bincount().tolist()

    def padded(value_1S: Tensor) -> Tensor:
        return pad_sequence(list(value_1S[0].split(lengths)), batch_first=True)

    ids_1S = inputs["input_ids"]
    mask_BL = padded(torch.ones_like(ids_1S))
    taken = inspect.signature(body.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in taken}
    arguments = {
        name: padded(value) if value.shape == ids_1S.shape else value for name, value in given.items()
    }
    positions_3BL, _ = body.get_rope_index(**arguments | {"attention_mask": mask_BL})
    return positions_3BL[:, mask_BL.bool()][:, None]


def _has_linear_attention(model: Any) -> bool:
    return "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def _for_kernels(position_ids_1S: Tensor) -> dict[str, Any]:
    """Where examples begin, as flash-linear-attention and causal-conv1d take it."""
    examples_S = examples_of(position_ids_1S)
    lengths_B = examples_S.bincount()
    ends = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)]).to(torch.int32)
    return {"seq_idx": examples_S[None].to(torch.int32), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
