"""What a picture costs a student's vision tower, against what a token costs its language model.

    tokens_per_pixel(model)      # 0.002: 500 pixels are as much work as one token

Counted in multiplications with weights, from the sizes of the parts alone: attention, activations and the head are
left out.  A part is passed through once forwards, once more for the gradient of its inputs where a gradient goes
through it, and once for that of its weights, as far as they are trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shared.models.router import num_experts
from stage2_student.training.freezing import find_parts


def tokens_per_pixel(model: PreTrainedModel) -> float:
    """0.0 where the model has no tower, or does not say how large its patches are.

    The model may be on the meta device; what is trained has been chosen.
    """
    parts = find_parts(model)
    tower, patch_pixels = parts["vision"], _pixels_of_a_patch(model)
    if not tower or not patch_pixels:
        return 0.0
    connector = {id(p) for module in parts["connector"] for p in module.parameters()}
    of_tower = [p for p in _weights(tower) if id(p) not in connector]
    head = model.get_output_embeddings()
    of_language = [p for p in _weights(parts["language"]) if head is None or p is not head.weight]
    is_trained = any(p.requires_grad for p in of_tower)
    a_patch = _multiplications(of_tower, is_passed_back=is_trained)
    a_token = _multiplications(of_language, is_passed_back=True, share_of_experts=_share_of_experts(model))
    return a_patch / patch_pixels / max(1.0, a_token)


def _pixels_of_a_patch(model: PreTrainedModel) -> int:
    config = getattr(model.config, "vision_config", None)
    size: Any = getattr(config, "patch_size", None) or 0
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return int(height) * int(width)


def _weights(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What activations are multiplied with: no tables, norms or biases.  Each once."""
    found = {
        id(parameter): parameter
        for module in modules
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
        if parameter.ndim > 1
    }
    return list(found.values())


def _multiplications(
    weights: Iterable[nn.Parameter], *, is_passed_back: bool, share_of_experts: float = 1.0
) -> float:
    total = 0.0
    for weight in weights:
        is_of_experts = share_of_experts < 1 and weight.ndim == 3
        passes = 1 + is_passed_back + weight.requires_grad
        total += passes * weight.numel() * (share_of_experts if is_of_experts else 1)
    return total


def _share_of_experts(model: PreTrainedModel) -> float:
    """Of them, that a token goes through."""
    number = num_experts(model)
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return min(1.0, taken / number) if number and taken else 1.0
