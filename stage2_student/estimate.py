"""Memory of one device in training, part by part, from shapes alone.

Model states are exact; activations are a rule of thumb (docs of this file's functions), meant to tell a
recipe that fits from one that does not, not to fill a device to the last gibibyte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedModel

from shared.models.chunks import chunk_positions
from shared.models.plans import Plan
from shared.models.sharding import blocks
from shared.models.vlm import split
from shared.recipes import Recipe
from shared.runtime import default_device
from stage2_student.training.order import limits_of

GIB = 2**30
NO_PLAN = Plan()
# Tensors of (tokens, hidden) that a transformer block keeps for its backward pass, MLP included, in units of the
# compute dtype: on each of several tensor ranks, and those that they share.
# Source: Korthikanti et al. 2022 (arXiv 2205.05198), equation 2: 10 + 24 / t bytes at 2 bytes each.
KEPT_WHOLE, KEPT_SPLIT = 5, 12


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on each device."""

    weights: float  # master weights, sharded and split
    gradients: float  # as the weights; while several microbatches add up, in fp32 and whole on each rank
    moments: float  # of AdamW
    gathered: float  # root and two blocks in the compute dtype, and the root's gradients
    loss: float  # logits of a chunk, the gradient of a trained head in fp32
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Sizes:
    """Numbers on one rank, of parameters that are whole or split among the ranks of a plan.

    num_split_over  ranks of the plan
    num_shards      what FSDP shards over: of what is whole on all ranks of the plan
    """

    split_ids: frozenset[int]
    num_split_over: int
    num_shards: int
    num_ranks_of_copy: int

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: Recipe, plan: Plan, num_ranks: int) -> _Sizes:
        names = plan.tensor.keys() | plan.expert.keys()
        ids = frozenset(id(parameter) for name, parameter in model.named_parameters() if name in names)
        parallel = recipe.parallel
        of_copy = max(1, num_ranks // parallel.dp_replicate)
        num_shards = max(1, of_copy // parallel.tensor)
        return cls(ids, max(parallel.tensor, parallel.expert), num_shards, of_copy)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> float:
        return sum(p.numel() / (self.num_split_over if id(p) in self.split_ids else 1) for p in parameters)

    def sharded(self, parameters: Iterable[nn.Parameter]) -> float:
        return sum(
            p.numel() / (self.num_ranks_of_copy if id(p) in self.split_ids else self.num_shards)
            for p in parameters
        )


def estimate_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    num_ranks: int,
    tokens_per_example: int,
    plan: Plan = NO_PLAN,
) -> MemoryEstimate:
    """Of training ``model`` (on the meta device, freezing applied) by ``recipe``, its layers split by the plan."""
    sizes = _Sizes.of(model, recipe, plan, num_ranks)
    master = getattr(torch, recipe.student.param_dtype).itemsize
    compute = getattr(torch, recipe.student.compute_dtype).itemsize
    every, trained = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    own = blocks(model, min_params=recipe.parallel.min_block_params)
    in_blocks = [sizes.gathered(block.parameters()) for block in own]
    root = sizes.gathered(every) - sum(in_blocks)
    tokens = tokens_at_once(recipe, tokens_per_example)
    num_data_ranks = max(1, num_ranks // recipe.parallel.tensor)
    accumulates = recipe.optimization.global_batch_size * tokens_per_example > tokens * num_data_ranks
    head = split(model)[1].weight_VD
    chunk = chunk_positions(recipe.loss.chunk_size, head.shape[0], default_device())
    head_rows = head.shape[0] / recipe.parallel.tensor
    offloaded = 0 if recipe.parallel.cpu_offload else 1
    gradients = sizes.gathered(trained) * 4 if accumulates else offloaded * sizes.sharded(trained) * master
    logits = chunk * head_rows * _bytes_of_logit(recipe, compute)
    head_gradient = head_rows * head.shape[1] * 4 if head.requires_grad else 0
    return MemoryEstimate(
        weights=offloaded * sizes.sharded(every) * master / GIB,
        gradients=gradients / GIB,
        moments=offloaded * sizes.sharded(trained) * 2 * master / GIB,
        gathered=(2 * root + 2 * max(in_blocks, default=0)) * compute / GIB,
        loss=(logits + head_gradient) / GIB,
        activations=_activations(model, recipe, tokens) * compute / GIB,
    )


def _bytes_of_logit(recipe: Recipe, compute: int) -> int:
    """In a chunk.  The kernels take no copy; PyTorch, for a vocabulary that ranks split, takes one in fp32, and
    another one at a temperature.
    """
    if recipe.parallel.tensor == 1:
        return compute
    return compute + 4 * (1 + (recipe.loss.temperature != 1.0))


def count_parameters(model: PreTrainedModel, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def tokens_at_once(recipe: Recipe, tokens_per_example: int) -> int:
    """Of a rank's largest microbatch."""
    config, limits = recipe.optimization, limits_of(recipe.optimization)
    tokens = min(limits.examples or config.global_batch_size, config.global_batch_size) * tokens_per_example
    return tokens if limits.tokens is None else max(tokens_per_example, min(tokens, limits.tokens))


def _activations(model: PreTrainedModel, recipe: Recipe, tokens: int) -> float:
    """Numbers kept for the backward pass: per block one (tokens, hidden) if checkpointed, else 17 of them."""
    text = model.config.get_text_config()
    kept, of_block = text.hidden_size * tokens, KEPT_WHOLE + KEPT_SPLIT / recipe.parallel.tensor
    if recipe.student.activation_checkpointing:
        return float(kept * (text.num_hidden_layers + of_block))
    return float(kept * text.num_hidden_layers * of_block)
