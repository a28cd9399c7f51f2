"""Memory of one device in training, part by part, from shapes alone.

Model states are exact; activations are a rule of thumb (docs of this file's functions), meant to tell a
recipe that fits from one that does not, not to fill a device to the last gibibyte.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedModel

from shared.models.chunks import chunk_positions
from shared.models.sharding import blocks
from shared.models.vlm import split
from shared.recipes import Recipe
from shared.runtime import default_device
from stage2_student.training.order import limits_of

GIB = 2**30
# Tensors of (tokens, hidden) that a transformer block keeps for its backward pass, MLP included, in units of the
# compute dtype.  Source: Korthikanti et al. 2022 (arXiv 2205.05198), equation 1: 34 bytes at 2 bytes each.
KEPT_PER_BLOCK = 17


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on each device."""

    weights: float  # master weights, sharded
    gradients: float  # in fp32; whole on each rank while microbatches are accumulated over several ranks
    moments: float  # of AdamW
    gathered: float  # root and two blocks in the compute dtype, and the root's gradients
    loss: float  # logits of a chunk, the head's gradient in fp32
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    model: PreTrainedModel, recipe: Recipe, *, num_ranks: int, tokens_per_example: int
) -> MemoryEstimate:
    """Of training ``model`` (on the meta device, freezing applied) by ``recipe``."""
    sharded_over = max(1, num_ranks // recipe.parallel.dp_replicate)
    master = getattr(torch, recipe.student.param_dtype).itemsize
    compute = getattr(torch, recipe.student.compute_dtype).itemsize
    all_, trained = count_parameters(model), count_parameters(model, trained_only=True)
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    root = all_ - sum(in_blocks)
    tokens = tokens_at_once(recipe, tokens_per_example)
    accumulates = recipe.optimization.global_batch_size * tokens_per_example > tokens * num_ranks
    head = split(model)[1].weight_VD
    chunk = chunk_positions(recipe.loss.chunk_size, head.shape[0], default_device())
    offloaded = 0 if recipe.parallel.cpu_offload else 1
    return MemoryEstimate(
        weights=offloaded * all_ * master / sharded_over / GIB,
        gradients=trained * 4 / (1 if accumulates else sharded_over) / GIB,
        moments=offloaded * trained * 2 * master / sharded_over / GIB,
        gathered=(2 * root + 2 * max(in_blocks, default=0)) * compute / GIB,
        loss=(chunk * head.shape[0] * (4 + compute) + head.numel() * 4) / GIB,
        activations=_activations(model, recipe, tokens) * compute / GIB,
    )


def count_parameters(model: PreTrainedModel, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def tokens_at_once(recipe: Recipe, tokens_per_example: int) -> int:
    """Of a rank's largest microbatch."""
    config, limits = recipe.optimization, limits_of(recipe.optimization)
    tokens = min(limits.examples or config.global_batch_size, config.global_batch_size) * tokens_per_example
    return tokens if limits.tokens is None else max(tokens_per_example, min(tokens, limits.tokens))


def _activations(model: PreTrainedModel, recipe: Recipe, tokens: int) -> int:
    """Numbers kept for the backward pass: per block one (tokens, hidden) if checkpointed, else 17 of them."""
    text = model.config.get_text_config()
    kept = text.hidden_size * tokens
    if recipe.student.activation_checkpointing:
        return kept * (text.num_hidden_layers + KEPT_PER_BLOCK)
    return kept * text.num_hidden_layers * KEPT_PER_BLOCK
