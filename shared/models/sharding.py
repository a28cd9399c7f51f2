"""A model that no rank holds whole: its blocks, and how weights get from one rank's host memory to all shards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from shared.errors import RecipeError
from shared.models.quantized import first_difference
from shared.runtime import World


def blocks(model: PreTrainedModel, *, min_params: int = 0) -> list[nn.Module]:
    """The repeated blocks, innermost first: those Transformers keeps on one device, else list members.

    min_params  that a block has; smaller ones are left out
    """
    names = set(model._no_split_modules or [])
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = [block for members in lists for block in members if any(True for _ in block.parameters())]
    return [
        block
        for block in found[::-1]
        if sum(parameter.numel() for parameter in block.parameters()) >= min_params
    ]


def fill(model: nn.Module, source: nn.Module | None, world: World) -> None:
    """Copies parameters and buffers of the first rank's ``source`` into all ranks' shards, one at a time.

    Called by all ranks; ``source`` counts on the first only.  Buffers that no file holds (rotary tables) are
    among them: on the meta device they were never computed.

    Raises   RecipeError  on all ranks, when the source has a tensor that the model has not, or of another kind
    """
    world.by_main(lambda: _require_same_tensors(model, source))  # the first rank has read files meanwhile
    values = {} if source is None else dict(_named_tensors(source))
    with torch.no_grad():
        for name, own in _named_tensors(model):
            whole = torch.empty(own.shape, dtype=own.dtype, device=world.device)
            if source is not None:
                whole.copy_(values[name])
            _scatter(whole, own)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Nobody brings them to the device of the computation, as is done for parameters that are offloaded."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _require_same_tensors(model: nn.Module, source: nn.Module | None) -> None:
    """A scale left behind would make weights that are thousands of times too large, of finite numbers all of them."""
    if source is not None and (odd := first_difference(source, model)) is not None:
        raise RecipeError(
            f"model class {type(model).__name__}: {odd} has no place on the ranks that share the model: its weights "
            "are stored in another way. Do not shard it, or give the folder of an ordinary model"
        )


def _scatter(whole: Tensor, own: Tensor) -> None:
    """A DTensor's mesh need not hold the first rank: each rank gets the whole tensor, and takes its own part."""
    dist.broadcast(whole, src=0)
    if isinstance(own, DTensor):
        mine = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
        own.to_local().copy_(mine.to_local())
    else:
        own.copy_(whole)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
