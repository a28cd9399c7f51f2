"""How ranks stand to each other in a model that several of them hold: the axes of their mesh.

    meshes = make_meshes(world, replicate=1, tensor=2, expert=1)
    fully_shard(block, mesh=meshes.data)

Neighbouring ranks share a tensor axis, as they talk most.  Its ranks read the same rows; where experts are divided
among ranks that read different rows, these have a mesh of their own over the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shared.runtime import World

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
EXPERT_SHARD, EXPERT = "expert_shard", "expert"


@dataclass(frozen=True)
class Meshes:
    """data         what FSDP shards over: ("shard",), or ("replicate", "shard")
    tensor       ranks that read the same rows; None where nothing is split among ranks
    expert       ranks that hold a layer's experts together; None where no others do than those of ``tensor``
    expert_data  what FSDP shards those experts over
    """

    data: DeviceMesh
    tensor: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    expert_data: DeviceMesh | None = None


def make_meshes(world: World, *, replicate: int = 1, tensor: int = 1, expert: int = 1) -> Meshes:
    """Called by all ranks, whose number the sizes divide."""
    assert world.size % (replicate * max(tensor, expert)) == 0
    num_shards = world.size // (replicate * tensor)
    if tensor == expert == 1:
        return Meshes(_mesh(world, {REPLICATE: replicate, SHARD: num_shards}, SHARD))
    root = _mesh(world, {REPLICATE: replicate, SHARD: num_shards, TENSOR: tensor}, SHARD, TENSOR)
    data = root[_data_axes(root, SHARD)]
    if tensor > 1:
        return Meshes(data, root[TENSOR])
    axes = {REPLICATE: replicate, EXPERT_SHARD: num_shards // expert, EXPERT: expert}
    own = _mesh(world, axes, EXPERT_SHARD, EXPERT)
    return Meshes(data, root[TENSOR], own[EXPERT], own[_data_axes(own, EXPERT_SHARD)])


def _mesh(world: World, axes: dict[str, int], *always: str) -> DeviceMesh:
    """Without axes of one rank, but for those that are always there."""
    kept = {name: size for name, size in axes.items() if size > 1 or name in always}
    return init_device_mesh(world.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def _data_axes(root: DeviceMesh, shard: str) -> tuple[str, ...]:
    return (REPLICATE, shard) if REPLICATE in (root.mesh_dim_names or ()) else (shard,)
