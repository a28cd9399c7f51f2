"""The frozen teacher: whole sequences through the body, answer positions through the head, targets at once.

    teacher = load_teacher(recipe.teacher, num_token_ids=processor.num_token_ids, world=world)
    targets, ce_N = teacher.targets(batch, seeds_N, policy=..., temperatures=..., chunk_size=512)

Legend: N answer positions of the batch, n positions of a chunk, D hidden size, V ids the tokenizer knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shared.capture.targets import sparse_targets
from shared.data.collation import Batch
from shared.models.chunks import Chunk, chunk_positions
from shared.models.plans import apply_plan, plan_of
from shared.models.sharding import blocks, fill
from shared.models.vlm import (
    Head,
    empty_vlm,
    in_dtype_of,
    last_hidden_states,
    load_config,
    load_vlm,
    num_logit_ids,
    split,
)
from shared.models.weights import weight_fingerprint
from shared.recipes import TeacherConfig
from shared.recipes.policies import Policy
from shared.runtime import World
from shared.sparse import SparseTargets
from stage1_teacher.capturing.copies import DISMISSED, Followers
from stage1_teacher.capturing.stopwatch import Stopwatch


@dataclass(frozen=True)
class Teacher:
    """A frozen model on its device.

    num_token_ids        ids with a token and a logit; the head may be wider, and its padding ids carry no mass
    is_sharded           over all ranks, which must then call ``hidden`` the same number of times
    copy_group           ranks that share this copy (tensor or expert parallel), which must call all methods alike
    followers            those ranks, where the first of them asks the others; see ``led`` and ``follow``
    weights_fingerprint  of the whole model; on the first rank alone
    stopwatch            runs with body, head and log-softmax: what a live teacher would cost too
    """

    model: PreTrainedModel
    body: nn.Module
    head: Head
    num_token_ids: int
    device: torch.device
    stopwatch: Stopwatch
    is_sharded: bool = False
    copy_group: dist.ProcessGroup | None = None
    followers: Followers | None = None
    weights_fingerprint: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other ranks take part in each forward."""
        return self.is_sharded or self.copy_group is not None

    def led(self, world: World) -> Teacher:
        """Of a copy that ranks share: the first of them alone calls, the others ``follow``.  Called by all ranks."""
        if self.copy_group is None:
            return self
        return replace(self, followers=Followers.of(self.copy_group, world))

    @property
    def is_follower(self) -> bool:
        return self.followers is not None and not self.followers.is_leader

    def follow(self) -> int:
        """Computes what the leader of this copy asks for, until it is done; returns the status that it says."""
        assert self.followers is not None
        for name, tensors in self.followers.asked():
            if name == DISMISSED:
                return int(tensors["status"])
            if name == "seconds":
                self.followers.sum(self.stopwatch.seconds())
                continue
            with self.stopwatch.running():
                if name == "hidden":
                    self._hidden(tensors, tensors.pop("position_index"))
                else:
                    self._logits(tensors["hidden_nD"])
        raise AssertionError("a leader always dismisses")

    def dismiss_followers(self, status: int) -> None:
        if self.followers is not None:
            self.followers.dismiss(status)

    def seconds(self) -> float:
        """Of the teacher's own work, over the ranks of this copy; waits for the devices."""
        if self.followers is None:
            return self.stopwatch.seconds()
        self.followers.ask("seconds", {})
        return self.followers.sum(self.stopwatch.seconds())

    def chunk_positions(self, setting: Chunk) -> int:
        """Answer positions that pass the head together."""
        return chunk_positions(setting, self.head.weight_VD.shape[0], self.device)

    @torch.inference_mode()
    def targets(
        self,
        batch: Batch,
        seeds_N: Tensor,
        *,
        policy: Policy,
        temperatures: Sequence[float],
        chunk_size: int,
    ) -> tuple[SparseTargets, Tensor]:
        """Sparse targets of the batch's answer positions, and the teacher's cross-entropy there.

        Shapes   seeds_N (N,) int64; returns targets of N positions and (N,) fp32 nats, both on the device
        Holds    at no time are there more than ``chunk_size`` rows of logits; no logits of prompts exist
        """
        return self.sparse_targets(
            self.hidden(batch),
            batch.labels,
            seeds_N,
            policy=policy,
            temperatures=temperatures,
            chunk_size=chunk_size,
        )

    @torch.inference_mode()
    def sparse_targets(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        seeds_N: Tensor,
        *,
        policy: Policy,
        temperatures: Sequence[float],
        chunk_size: int,
    ) -> tuple[SparseTargets, Tensor]:
        """What ``targets`` makes of the body's hidden states."""
        return sparse_targets(
            hidden_ND,
            labels_N,
            seeds_N,
            logprobs=self.logprobs,
            policy=policy,
            temperatures=temperatures,
            chunk_size=chunk_size,
        )

    @torch.inference_mode()
    def is_sound(self, hidden_nD: Tensor, *, chunk_size: int) -> bool:
        """Whether the log-probs of these positions are numbers whose probabilities sum to one."""
        return all(
            bool(((self.logprobs(chunk_nD).exp().sum(-1) - 1).abs() < 1e-3).all())
            for chunk_nD in hidden_nD.split(chunk_size)
        )

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states (N, D) that predict the batch's answer tokens."""
        inputs = in_dtype_of(self.head, batch.inputs)
        if self.followers is not None:
            self.followers.ask("hidden", inputs | {"position_index": batch.position_index})
        with self.stopwatch.running():
            return self._hidden(inputs, batch.position_index)

    @torch.inference_mode()
    def logprobs(self, hidden_nD: Tensor) -> Tensor:
        """Natural log-probabilities (n, V) fp32 at temperature 1."""
        if self.followers is not None and isinstance(self.head.weight_VD, DTensor):
            self.followers.ask("logits", {"hidden_nD": hidden_nD})
        with self.stopwatch.running():
            return self._logits(hidden_nD)[:, : self.num_token_ids].float().log_softmax(-1)

    @torch.inference_mode()
    def _hidden(self, inputs: dict[str, Tensor], position_index: Tensor) -> Tensor:
        return last_hidden_states(self.body, inputs).flatten(0, 1)[position_index]

    @torch.inference_mode()
    def _logits(self, hidden_nD: Tensor) -> Tensor:
        """Of all ids of the head, on each rank: those of a split head are gathered."""
        return self.head.logits(hidden_nD)


def load_teacher(
    config: TeacherConfig, *, num_token_ids: int, world: World, num_answer_ids: int | None = None
) -> Teacher:
    """The teacher with its weights on the device; called by all ranks.

    With ``config.shard`` each block is sharded over all ranks (FSDP2); embeddings, norms and head stay whole on
    every rank.  With ``config.tensor`` or ``config.expert`` so many ranks share each copy.  Of both the first rank
    alone reads the weights.

    num_answer_ids  as ``num_logit_ids`` takes it

    Raises   RecipeError  when it cannot be opened, or split into body and head, or has fewer ids than the tokenizer,
                          or cannot be shared by so many ranks
    """
    config.require_ranks(world.size)
    is_sharded, in_copies = config.shard and world.size > 1, config.ranks_per_copy > 1
    is_whole = not is_sharded and not in_copies
    if not is_whole:  # before weights are read, which takes long: what cannot be split is refused now
        model = empty_vlm(
            load_config(config.model, config.revision),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )
        mesh = _split(model, config, world) if in_copies else _shard(model, world)
    source = _whole(config, world, dequantize=not is_whole) if world.is_main or is_whole else None
    fingerprint = weight_fingerprint(source) if source is not None and world.is_main else None
    if is_whole:
        assert source is not None
        model = source
        nn.Module.to(model, world.device)
    else:
        model.to_empty(device=world.device)
        model.tie_weights()  # which to_empty has undone
        fill(model, source, world)
    num_ids = num_logit_ids(
        model, num_token_ids, num_answer_ids=num_answer_ids, what=f"teacher {config.model}"
    )
    body, head = split(model)
    return Teacher(
        model.requires_grad_(False).eval(),
        body,
        head,
        num_ids,
        world.device,
        Stopwatch(world.device),
        is_sharded=is_sharded,
        copy_group=mesh.get_group() if in_copies else None,
        weights_fingerprint=fingerprint,
    )


def _whole(config: TeacherConfig, world: World, *, dequantize: bool) -> PreTrainedModel:
    return load_vlm(
        config.model,
        revision=config.revision,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        dequantize=dequantize,
        device=world.device,
    )


def _shard(model: PreTrainedModel, world: World) -> DeviceMesh:
    """Shards the blocks of the empty model over all ranks."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return mesh


def _split(model: PreTrainedModel, config: TeacherConfig, world: World) -> DeviceMesh:
    """Splits the empty model over the ranks of a copy, which are neighbours: the axis of these."""
    shape = (world.size // config.ranks_per_copy, config.ranks_per_copy)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("copies", "ranks"))["ranks"]
    apply_plan(model, plan_of(model, tensor=config.tensor, expert=config.expert, section="teacher"), mesh)
    return mesh
