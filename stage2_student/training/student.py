"""The student and its loss as one FSDP2 root module.

    student = build_student(recipe, world, num_token_ids=...)
    losses, router = student(inputs, position_index, labels, targets)   # sums, of this rank's microbatch
    found = student.measure(inputs, position_index, labels, targets)    # for validation: each position's CE, KL

The loss lies inside the root module, so that the head is gathered once a forward, by the root, and no logits
of a batch ever exist.  Each decoder layer and vision block is a module of its own to FSDP; everything else
belongs to the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.errors import RecipeError
from shared.kd_loss import LossSums, ce_kd_by_position, fused_ce_kd
from shared.kd_loss.kept import highest
from shared.model_check import check_model
from shared.models.chunks import chunk_positions
from shared.models.meshes import make_meshes
from shared.models.packing import examples_of, is_packed, require_packing
from shared.models.plans import Plan, apply_plan, plan_of
from shared.models.quantized import without_quantization
from shared.models.router import RouterLoss, num_experts, require_same_router_loss
from shared.models.sharding import blocks, fill, move_buffers
from shared.models.vlm import (
    empty_vlm,
    hidden_and_router_logits,
    in_dtype_of,
    last_hidden_states,
    load_config,
    load_vlm,
    num_logit_ids,
    split,
)
from shared.recipes import LossConfig, ParallelConfig, Recipe, StudentConfig
from shared.runtime import World
from shared.sparse import MixedTargets, RegroupedTargets, SparseTargets, Targets
from stage2_student.training.emphasis import Weighing, scores
from stage2_student.training.freezing import find_parts, freeze
from stage2_student.training.lora import add_adapters, beside_adapters
from stage2_student.training.picture_costs import tokens_per_pixel
from stage2_student.training.reliability import student_reliability

KL_TEMPERATURE = 1.0  # of the KL that is reported, whatever the loss's own, so that students can be compared


class Forwarded(NamedTuple):
    """Of N positions.

    router  the load-balancing loss of the router times the tokens that it is of, () fp32; None without one
    """

    losses: LossSums
    router: Tensor | None


class Measured(NamedTuple):
    """Of N positions.

    router       as a forward has it
    ce_N         cross-entropy with the label, (N,) fp32, nats
    kl_N         to the teacher at temperature 1, (N,) fp32, nats; None where the targets do not give it
    soft_ce_N    with a teacher of another tokenizer at temperature 1, (N,) fp32, nats: 0 where a position is not
                 shared; None for a teacher of the same tokenizer
    reliability  the student's, as ``training.reliability`` has it
    """

    losses: LossSums
    router: Tensor | None
    ce_N: Tensor
    kl_N: Tensor | None
    reliability: Tensor
    soft_ce_N: Tensor | None = None


def kl_tail(targets: Targets | None) -> str | None:
    """The tail of a KL that runs are compared by, whatever that of their loss is; None: the loss's own.

    Of targets that are cut off.  With the bucket of ``ghost`` it is a lower bound of the dense KL; a mix has none.
    """
    if isinstance(targets, MixedTargets):
        return None if targets.parts[0].policy.is_sampled else "uniform"
    return None if not isinstance(targets, SparseTargets) or targets.policy.is_sampled else "ghost"


class StudentWithLoss(nn.Module):
    """A vision-language model whose forward returns losses instead of logits.

    num_token_ids     ids with a token and a logit; the head may be wider, and the teacher has no mass beyond them
    tokens_per_pixel  what a pixel costs the tower, in tokens of the language model
    """

    def __init__(self, model: PreTrainedModel, loss: LossConfig, *, num_token_ids: int) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.num_token_ids = num_token_ids
        self.tokens_per_pixel = tokens_per_pixel(model)
        self.router = RouterLoss.of(model)

    def forward(
        self,
        inputs: dict[str, Tensor],
        position_index: Tensor,
        labels: Tensor,
        targets: Targets | None,
        num_rows: int | None = None,
        label_logprobs: Tensor | None = None,
        weighing: Weighing | None = None,
    ) -> Forwarded:
        """Shapes   position_index (N,) int64 into the flattened (B * S) hidden states; labels (N,) int64
        label_logprobs (N,) fp32, the teacher's of labels that the student wrote, else NaN; None: no reverse KL
        weighing  which positions count, and how much; None: all alike
        num_rows  the first examples, whose tokens count for the router; None: all
        Returns  sums over the N positions, fp32 nats; with N = 0 zeros that still have a graph
        """
        hidden_ND, router = self._hidden(inputs, position_index, num_rows)
        if weighing is None:
            return Forwarded(self._losses(hidden_ND, labels, targets, label_logprobs), router)
        return Forwarded(self._weighed_losses(hidden_ND, labels, targets, label_logprobs, weighing), router)

    def measure(
        self,
        inputs: dict[str, Tensor],
        position_index: Tensor,
        labels: Tensor,
        targets: Targets | None,
        num_rows: int | None = None,
    ) -> Measured:
        """As ``forward``, and what only validation asks for; called by all ranks."""
        hidden_ND, router = self._hidden(inputs, position_index, num_rows)
        reliability = student_reliability(hidden_ND, split(self.model)[1], labels)
        is_measured = targets is not None and KL_TEMPERATURE in targets.temperatures
        temperature = KL_TEMPERATURE if is_measured else self._temperature
        own_tail = self.loss.tail_mode
        tail = kl_tail(targets) or own_tail
        head = self._loss_inputs(hidden_ND) | {"tail": tail}
        each = ce_kd_by_position(labels_N=labels, targets=targets, temperature=temperature, **head)
        if (temperature, tail) == (self._temperature, own_tail):
            losses = each.sums(labels, kd_ratio=self.loss.kd_ratio)
        else:
            losses = self._losses(hidden_ND, labels, targets)
        kd_N = each.kd_N if is_measured else None
        if isinstance(targets, RegroupedTargets):  # whose entropy is not known: this is no KL
            soft_ce_N = None if kd_N is None else kd_N * targets.is_shared_N
            return Measured(losses, router, each.ce_N, None, reliability, soft_ce_N=soft_ce_N)
        return Measured(losses, router, each.ce_N, kd_N, reliability)

    @property
    def _temperature(self) -> float:
        """Of the loss.  By labels alone the recipe's takes no part, and need not have been captured."""
        return self.loss.temperature if self.loss.kd_ratio > 0 else KL_TEMPERATURE

    def _hidden(
        self, inputs: dict[str, Tensor], position_index: Tensor, num_rows: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """(N, D), before the head, and the router's loss."""
        body, head = split(self.model)
        inputs = in_dtype_of(head, inputs)
        router = None
        if self.router is None:
            hidden = last_hidden_states(body, inputs)
        else:
            hidden, router_logits = hidden_and_router_logits(body, inputs)
            router = self.router.weighted(router_logits, counted_tokens(inputs, num_rows))
        return hidden.flatten(0, 1).index_select(0, position_index), router

    @property
    def trains_on_kept(self) -> bool:
        """Whether CE, too, is over the kept positions alone."""
        return self.loss.positions is not None and self.loss.positions.ce == "kept"

    def _weighed_losses(
        self,
        hidden_ND: Tensor,
        labels: Tensor,
        targets: Targets | None,
        label_logprobs: Tensor | None,
        weighing: Weighing,
    ) -> LossSums:
        weights_N, kd_factors_N, kd_ratio_N = weighing.weights_N, None, weighing.kd_ratio_N
        if weighing.keep is not None and self.loss.positions is not None:
            scores_N = scores(
                self.loss.positions.by,
                weighing,
                labels,
                targets,
                temperature=self._temperature,
                **self._loss_inputs(hidden_ND),
            )
            index = highest(scores_N, weighing.lengths, weighing.keep)
            if self.trains_on_kept:
                hidden_ND, labels = hidden_ND[index], labels[index]
                targets = None if targets is None else targets.select(index)
                weights_N = None if weights_N is None else weights_N[index]
                label_logprobs = None if label_logprobs is None else label_logprobs[index]
                kd_ratio_N = None if kd_ratio_N is None else kd_ratio_N[index]
            else:
                kd_factors_N = torch.zeros_like(scores_N).index_fill(0, index, weighing.kd_scale)
        factors: dict[str, Any] = {"weights_N": weights_N, "kd_factors_N": kd_factors_N}
        if kd_ratio_N is not None:
            factors["kd_ratio"] = kd_ratio_N
        losses = self._losses(hidden_ND, labels, targets, label_logprobs, **factors)
        # It divides a step's loss: a position of weight 0 is one of those whose weights average one.
        return losses._replace(num_positions=torch.full_like(losses.num_positions, len(labels)))

    def _losses(
        self,
        hidden_ND: Tensor,
        labels: Tensor,
        targets: Targets | None,
        label_logprobs: Tensor | None = None,
        **factors: Any,
    ) -> LossSums:
        return fused_ce_kd(
            labels_N=labels,
            targets=targets,
            temperature=self._temperature,
            reverse_kl=0.0 if label_logprobs is None else self.loss.reverse_kl or 0.0,
            label_logprobs_N=label_logprobs,
            **self._loss_inputs(hidden_ND),
            **{"kd_ratio": self.loss.kd_ratio, **factors},
        )

    def _loss_inputs(self, hidden_ND: Tensor) -> dict[str, Any]:
        """Hidden states and head as the loss takes them, and what of its settings does not depend on the labels."""
        _, head = split(self.model)
        return {
            "hidden_ND": hidden_ND * head.scale if head.scale != 1.0 else hidden_ND,
            "weight_VD": head.weight_VD,
            "bias_V": head.bias_V if head.bias_V is None or head.scale == 1.0 else head.bias_V * head.scale,
            "softcap": head.softcap,
            "chunk_size": chunk_positions(self.loss.chunk_size, head.weight_VD.shape[0], hidden_ND.device),
            "num_vocab_ids": self.num_token_ids,
            "tail": self.loss.tail_mode,
        }

    def check(
        self,
        processor: ExampleProcessor,
        examples: Sequence[Encoded],
        device: torch.device,
        *,
        packing: bool = False,
    ) -> None:
        """``check_model`` of the sharded model; called by all ranks, with the same examples.

        Raises   RecipeError  when it does not compute what is taken for granted, or its router's loss is not ours
        """
        check_model(self.model, processor, examples, device=device, packing=packing)
        if self.router is not None:
            self._check_router(self.router, processor.collate(examples[:1]).to(device).inputs)

    @torch.no_grad()
    def _check_router(self, router: RouterLoss, inputs: dict[str, Tensor]) -> None:
        body, head = split(self.model)
        inputs, mask_BS = in_dtype_of(head, inputs), inputs["attention_mask"]
        _, router_logits = hidden_and_router_logits(body, inputs)
        own = self.model(**inputs, use_cache=False, logits_to_keep=1, output_router_logits=True)
        ours = router.weighted(router_logits, mask_BS) / mask_BS.sum()
        require_same_router_loss(self.model, ours, own.aux_loss)


def counted_tokens(inputs: dict[str, Tensor], num_examples: int | None) -> Tensor:
    """(B, S) int64: 1 for the tokens of the first examples, of all where there is no number; padding has 0."""
    if is_packed(inputs):
        examples_S = examples_of(inputs["position_ids"])
        end = examples_S[-1] + 1 if num_examples is None else num_examples
        return (examples_S < end)[None].long()
    counted = inputs["attention_mask"].clone()
    counted[len(counted) if num_examples is None else num_examples :] = 0
    return counted


def build_student(
    recipe: Recipe, world: World, *, num_token_ids: int, num_answer_ids: int | None = None
) -> StudentWithLoss:
    """The student, sharded over all ranks, with its weights; the first rank alone reads them.

    No rank holds the whole model on its device: it is sharded while on the meta device, and each tensor then
    goes from the first rank's host memory to its shards.

    num_answer_ids  as ``num_logit_ids`` takes it
    """
    skeleton = meta_model(recipe.student)
    num_ids = num_logit_ids(
        skeleton, num_token_ids, num_answer_ids=num_answer_ids, what=f"student {recipe.student.model}"
    )
    if recipe.optimization.packing:
        require_packing(skeleton)
    plan = plan_of_student(skeleton, recipe.parallel)
    choose_trained(skeleton, recipe.student, seed=recipe.run.seed)
    if recipe.student.activation_checkpointing:
        # The public switch has changed its name, and makes embeddings that nobody trains require gradients.
        skeleton._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    student = StudentWithLoss(skeleton, recipe.loss, num_token_ids=num_ids)
    if recipe.student.compile:
        compile_layers(skeleton, backend=recipe.student.compile_backend)
    shard(student, recipe.student, recipe.parallel, world, beside_adapters(plan, skeleton))
    student.to_empty(device="cpu" if recipe.parallel.cpu_offload else world.device)
    source = None
    if world.is_main:
        source = full_model(recipe.student, seed=recipe.run.seed)
        choose_trained(source, recipe.student, seed=recipe.run.seed)
    fill(skeleton, source, world)
    move_buffers(student, world.device)
    for module in fsdp_modules(
        student
    ):  # a block that no row has run yet, as of a tower without pictures, has no
        module.unshard()  # parameter that the backward of a microbatch before the last could look at
        module.reshard()
    return student.train()


def plan_of_student(model: PreTrainedModel, parallel: ParallelConfig) -> Plan:
    """How its layers are split among ranks; ``model`` may be on the meta device, and has no adapters yet.

    Tensor parallel divides a layer's experts, and does not cut through them: of a cut through gate and up at once no
    checkpoint could tell which rows a rank has.

    Raises   RecipeError  when they cannot be split
    """
    if parallel.tensor == 1 or not num_experts(model):
        return plan_of(model, tensor=parallel.tensor, expert=parallel.expert, section="parallel")
    try:
        return plan_of(model, tensor=parallel.tensor, expert=parallel.tensor, section="parallel")
    except RecipeError as error:
        raise RecipeError(
            f"parallel.tensor {parallel.tensor}: the same ranks would divide the experts of each layer. {error}"
        ) from error


def choose_trained(model: PreTrainedModel, config: StudentConfig, *, seed: int) -> None:
    """Freezes what is not trained, and adds the adapters that are, if there are to be any.

    seed  of the adapters' first weights, which do not depend on the number of ranks
    """
    freeze(model, config.freeze)
    if config.lora is not None:
        add_adapters(model, config.lora, seed=seed)


def compile_layers(model: PreTrainedModel, *, backend: str) -> None:
    """torch.compile of each decoder layer, in place, so that names stay, and inside of FSDP's hooks.

    Vision blocks are left as they are: they split by the pictures' sizes, which breaks their graphs.

    Raises   RecipeError  for a backend that torch does not have
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise RecipeError(f"student.compile_backend {backend!r} is none of torch's: {known}")
    # Layers share one code object, whose limit of 8 is met by two kinds of layers, with and without autograd, at a
    # few lengths each; beyond it, dynamo silently goes on without compiling.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    inside = {id(module) for part in find_parts(model)["language"] for module in part.modules()}
    for block in blocks(model):
        if id(block) in inside:
            block.compile(backend=backend)


def meta_model(config: StudentConfig) -> PreTrainedModel:
    """The student's shape without memory behind it, in its master dtype."""
    return empty_model(load_config(config.model, config.revision), config)


def empty_model(model_config: PretrainedConfig, config: StudentConfig) -> PreTrainedModel:
    dtype = getattr(torch, config.param_dtype)
    model = empty_vlm(model_config, dtype=dtype, attn_implementation=config.attn_implementation)
    for parameter in model.parameters():  # FSDP2 trains parameters of one type
        parameter.data = parameter.data.to(dtype)
    return model


def full_model(config: StudentConfig, *, seed: int) -> PreTrainedModel:
    """The student with its weights in host memory: from its files, or random from its configuration."""
    dtype = getattr(torch, config.param_dtype)
    if config.init == "pretrained":
        return load_vlm(
            config.model,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            dequantize=True,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_config = load_config(config.model, config.revision)
        return AutoModelForImageTextToText.from_config(without_quantization(model_config), dtype=dtype)


def shard(
    student: StudentWithLoss, config: StudentConfig, parallel: ParallelConfig, world: World, plan: Plan
) -> None:
    """Splits layers by the plan, then applies FSDP2 from the blocks that are large enough up to the root.

    Gradients are summed over ranks and not divided: the loss is already divided by the step's global number
    of positions.  Both settings must be made on every module: on the root alone, gradients are silently
    wrong.
    """
    meshes = make_meshes(
        world, replicate=parallel.dp_replicate, tensor=parallel.tensor, expert=parallel.expert
    )
    if meshes.tensor is not None:
        apply_plan(student.model, plan, meshes.tensor, experts=meshes.expert)
    compute, master = getattr(torch, config.compute_dtype), getattr(torch, config.param_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != master else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # models keep some inputs, such as rotary tables, in fp32 on purpose
    )
    offload = OffloadPolicy()
    if parallel.cpu_offload:  # pinned for copies to a GPU; without one the same path, which copies nothing
        offload = CPUOffloadPolicy(pin_memory=world.device.type != "cpu")
    sharded = partial(
        fully_shard, mp_policy=policy, offload_policy=offload, shard_placement_fn=_cut_evenly(meshes.data)
    )
    if meshes.expert_data is not None:
        for experts in plan.dispatched(student.model):
            sharded(experts, mesh=meshes.expert_data, reshard_after_forward=parallel.reshard_after_forward)
    for block in blocks(student.model, min_params=parallel.min_block_params):
        sharded(block, mesh=meshes.data, reshard_after_forward=parallel.reshard_after_forward)
    sharded(student, mesh=meshes.data, reshard_after_forward=False)
    for method in ("check", "measure"):
        register_fsdp_forward_method(student, method)
    for module in fsdp_modules(student):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _cut_evenly(data: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Which dimension of a parameter FSDP cuts: the first; the second of one whose first the plan has cut unevenly.

    An uneven cut of an uneven cut has pieces that a checkpoint would put in other places.

    Raises   RecipeError  when the second cannot be cut evenly either
    """
    num_shards = data.size(data.ndim - 1)

    def dimension(parameter: nn.Parameter) -> Shard | None:
        if not isinstance(parameter, DTensor) or Shard(0) not in parameter.placements:
            return None
        shape, over = tuple(parameter.shape), parameter.device_mesh.size()
        if shape[0] % over == 0:
            return None
        if len(shape) < 2 or shape[1] % num_shards:
            raise RecipeError(
                f"parallel.tensor {over}: a parameter of shape {shape}, as a head of {shape[0]:,} ids has, cannot be "
                f"split over {over} ranks and sharded over {num_shards} more. Choose numbers that divide one of its "
                "dimensions"
            )
        return Shard(1)

    return dimension


def fsdp_modules(student: nn.Module) -> Iterable[FSDPModule]:
    return (module for module in student.modules() if isinstance(module, FSDPModule))


def reshard(student: nn.Module) -> None:
    """Puts the sharded parameters back in place after a forward that no backward follows.

    The root stays gathered after its forward, for the backward.  Without one, its parameters would be plain
    tensors whose memory FSDP may free: reading them for a checkpoint crashed the process.
    """
    for module in fsdp_modules(student):
        module.reshard()
