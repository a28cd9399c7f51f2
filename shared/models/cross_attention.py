"""Rows of text among rows with pictures, in models that look at pictures by cross-attention (Mllama).

Alone, a row of text passes such a layer by.  In a batch with others, Transformers lets it look at all of what stands
in its picture's place; here the layer leaves it as it was, so that a row is what it is in any batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {"MllamaCrossAttentionDecoderLayer"}


def pass_text_rows_by(model: nn.Module) -> None:
    """Makes it so, in place; a model without such layers stays as it is."""
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            module.register_forward_hook(_without_text_rows, with_kwargs=True)


def _without_text_rows(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Shapes   the mask (B, 1, S, 1): 0 for tokens that may see no picture"""
    mask = kwargs.get("full_text_row_masked_out_mask")
    if mask is None:
        return output
    has_picture = mask[:, 0].any(dim=1, keepdim=True)
    return torch.where(has_picture, output, args[0])
