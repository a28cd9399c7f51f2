"""Rows with other numbers of pictures in one batch, in models that look at pictures by cross-attention (Mllama).

A token before any picture is masked out of all of them, and Transformers then lets it look at all that stands there:
at its own row's pictures when the row is alone, and in a batch at the padding in others' places too.  Here padding
stays hidden, and a row of text passes such a layer by, as it does alone; so a row is what it is in any batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LAYERS, TOWER = {"MllamaCrossAttentionDecoderLayer"}, "MllamaVisionModel"


def keep_rows_apart(model: PreTrainedModel) -> None:
    """Makes it so, in place; a model without such layers stays as it is."""
    layers = [module for module in model.modules() if type(module).__name__ in LAYERS]
    if not layers:
        return
    tower: Any = next(module for module in model.modules() if type(module).__name__ == TOWER)
    tokens_per_picture = tower.max_num_tiles * tower.num_patches
    hide = partial(_hide_padding, tokens_per_picture=tokens_per_picture)
    for layer in layers:
        layer.register_forward_pre_hook(hide, with_kwargs=True)
        layer.register_forward_hook(_without_text_rows, with_kwargs=True)


def _hide_padding(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, tokens_per_picture: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Masks the pictures behind the last that any token of a row may see.

    Shapes   cross_attention_mask (B, 1, S, T), 0 or the smallest number; the other (B, 1, S, 1), 0 for tokens that
             may see no picture
    """
    mask, sees_any = kwargs.get("cross_attention_mask"), kwargs.get("full_text_row_masked_out_mask")
    if mask is None or sees_any is None:
        return args, kwargs
    is_seen = ((mask == 0) & sees_any.bool()).any(dim=2).unflatten(-1, (-1, tokens_per_picture)).any(dim=-1)
    is_own = is_seen.flip(-1).cummax(dim=-1).values.flip(-1).repeat_interleave(tokens_per_picture, dim=-1)
    hidden = mask.masked_fill(~is_own[:, :, None], torch.finfo(mask.dtype).min)
    return args, kwargs | {"cross_attention_mask": hidden}


def _without_text_rows(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    sees_any = kwargs.get("full_text_row_masked_out_mask")
    if sees_any is None:
        return output
    return torch.where(sees_any[:, 0].any(dim=1, keepdim=True), output, args[0])
