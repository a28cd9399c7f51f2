"""Tensor and expert parallelism: which of a language model's tensors are split over ranks, by Transformers' plans.

    plan = plan_of(model, tensor=2, expert=1, section="teacher")   # of the empty model
    apply_plan(model, plan, mesh)                                  # an axis whose ranks all get the same batches
    model.to_empty(device=...)
    model.tie_weights()
    fill(model, source, world)

Hidden states are whole on every rank, as are the vision tower and the connector.  With a tensor plan the head is
split by rows of the vocabulary, evenly or not: its weight is a DTensor, and to call it gathers the logits of all
ids.  With an expert plan each rank holds some of a layer's experts.

The plans are Transformers' own, completed where they are missing or wrong.  A wrong one need not show in a loss: what
is not known to have the gradients of one process is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from shared.errors import RecipeError

# Of Transformers: earlier ones take plans in another form, and have no experts' plan that trains.
NEEDED = (5, 23)
# Of torch, for experts whose rows are split in two parts at once: before, nothing could put them together again.
NEEDED_FOR_PACKED = (2, 13)
GATHERED = "colwise_gather_output"
SUMMED = "replicated_with_grad_allreduce"
DENSE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
CROSS = {
    "layers.*.cross_attn.q_proj": "colwise",
    "layers.*.cross_attn.k_proj": "colwise",
    "layers.*.cross_attn.v_proj": "colwise",
    "layers.*.cross_attn.o_proj": "rowwise",
}
# Kinds of text models whose gradients are those of one process, with these plans (tests/test_plans.py): a wrong plan
# need not show in anything else.
TENSOR = {
    "aria_text",
    "cohere2",
    "deepseek_v3",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4v_moe_text",
    "glm4v_text",
    "llama",
    "llama4_text",
    "mistral",
    "mllama_text_model",
    "paddleocr_vl_text",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
}
EXPERT = {
    "aria_text",
    "deepseek_v3",
    "gemma4_text",
    "glm4v_moe_text",
    "qwen3_5_moe_text",
    "qwen3_vl_moe_text",
}
# By the kind of text model: those without a plan of their own, and modules whose output the family adds to in place.
MISSING = {"qwen3_vl_text": DENSE, "mllama_text_model": DENSE | CROSS}
WRITTEN_OVER = {"llama4_text": "shared_expert"}
IN_HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")  # not in every plan, though each rank norms its own heads alone
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")
SPLIT_DIM = {"colwise": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1, "grouped_gemm": 0}


@dataclass(frozen=True)
class Plan:
    """Names of modules and parameters, each with the style in which Transformers splits it.

    summed     modules that are whole on each rank but see its heads alone: their gradients are summed
    attention  modules whose heads are split
    copied     modules whose output is written over, which autograd forbids of what Transformers' styles return
    """

    tensor: Mapping[str, str] = field(default_factory=dict)
    expert: Mapping[str, str] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    def dispatched(self, model: PreTrainedModel) -> list[nn.Module]:
        """The modules whose experts lie on several ranks."""
        modules = dict(model.named_modules())
        return [modules[name] for name in self.expert if name in modules]

    def num_split(self, model: PreTrainedModel) -> int:
        """How many of the model's parameters are split; the others are whole on each rank."""
        names = self.tensor.keys() | self.expert.keys()
        return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def plan_of(model: PreTrainedModel, *, tensor: int, expert: int, section: str) -> Plan:
    """How a model is split over ``tensor`` and ``expert`` ranks: the same ranks, where both are more than one.

    model    may be on the meta device
    section  of the recipe, for errors: it has the settings ``tensor`` and ``expert``
    Raises   RecipeError  when it has no plan, or its heads, sizes or experts cannot be shared evenly
    """
    if tensor == expert == 1:
        return Plan()
    _require_settings(tensor, expert, section)
    experts = _expert_styles(model, expert, section) if expert > 1 else {}
    styles = _tensor_styles(model, tensor, section) if tensor > 1 else {}
    styles = {name: style for name, style in styles.items() if name not in experts}
    if any(style.startswith("packed") for style in styles.values()):
        _require_packed(tensor, section)
    _require_even(model, styles, tensor, f"{section}.tensor")
    _require_even(model, experts, expert, f"{section}.expert")
    modules = dict(model.named_modules())
    attention = [name.rpartition(".")[0] for name in styles if name.endswith(".q_proj")]
    summed = [name for name, style in styles.items() if style == SUMMED and name in modules]
    summed += [f"{name}.{norm}" for name in attention for norm in HEAD_NORMS]
    written = WRITTEN_OVER.get(model.get_decoder().config.model_type)
    tied = _tied_head(model)
    return Plan(
        {name: style for name, style in styles.items() if style != SUMMED and name != f"{tied}.weight"},
        experts,
        summed=tuple(name for name in dict.fromkeys(summed) if _has_parameters(modules.get(name))),
        attention=tuple(attention),
        copied=tuple(name for name in modules if name.rpartition(".")[2] == written),
    )


def apply_plan(
    model: PreTrainedModel, plan: Plan, mesh: DeviceMesh, *, experts: DeviceMesh | None = None
) -> None:
    """Splits the empty model over one axis of a mesh, whose ranks must all get the same batches.

    Parameters become DTensors of that axis; tied weights stay tied.

    experts  another axis for them, whose ranks may get other batches
    """
    if not plan.tensor and not plan.expert:
        return
    # Here, as releases that are too old do not have them.
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    tied = _tied_head(model) is not None
    modules = dict(model.named_modules())
    if plan.tensor:
        apply_tensor_parallelism(model, mesh, dict(plan.tensor))
    if plan.expert:
        apply_expert_parallelism(model, experts or mesh, mesh, dict(plan.expert))
    for name in plan.summed:
        _sum_gradients(modules[name], mesh.get_group())
    for name in plan.attention:
        _count_own_heads(modules[name], mesh.size())
    for name in plan.copied:
        modules[name].register_forward_hook(lambda module, args, output: output.clone())
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def has_plans() -> bool:
    """Whether the installed Transformers is new enough."""
    return _installed("transformers") >= NEEDED


def _installed(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version(package))[:2])


def _require_packed(size: int, section: str) -> None:
    if _installed("torch") < NEEDED_FOR_PACKED:
        raise RecipeError(
            f"{section}.tensor {size}: torch {version('torch')} found, {'.'.join(map(str, NEEDED_FOR_PACKED))} or "
            f"later is needed to split each expert. Upgrade it, or share whole experts: {section}.expert {size}"
        )


def _require_settings(tensor: int, expert: int, section: str) -> None:
    if 1 < tensor != expert > 1:
        raise RecipeError(
            f"{section}.tensor {tensor} and {section}.expert {expert}: where both are more than one they are the "
            "same ranks, so they must be equal"
        )
    if not has_plans():
        raise RecipeError(
            f"{section}.{'tensor' if tensor > 1 else 'expert'}: transformers {version('transformers')} found, "
            f"{'.'.join(map(str, NEEDED))} or later is needed. Upgrade it, or leave the setting out"
        )


def _tensor_styles(model: PreTrainedModel, size: int, section: str) -> dict[str, str]:
    decoder = model.get_decoder()
    if getattr(decoder.config, "hidden_size_per_layer_input", None):
        raise RecipeError(
            f"{section}.tensor {size}: {type(model).__name__} with hidden_size_per_layer_input reads rows of the "
            "embedding itself, which could not be split then. Leave the setting out; FSDP2 shards every family"
        )
    prefix = _name_of(model, decoder) + "."
    rules = {rule: style for rule, style in (model.tp_plan or {}).items() if rule.startswith(prefix)}
    kind = decoder.config.model_type
    if kind in MISSING:
        rules = {f"{prefix}{rule}": style for rule, style in MISSING[kind].items()}
    if kind not in TENSOR or "colwise" not in rules.values():
        raise _no_plan(model, f"{section}.tensor {size}", "tensor")
    rules[_name_of(model, model.get_input_embeddings())] = "embedding_rowwise"
    rules[_name_of(model, model.get_output_embeddings())] = GATHERED
    styles = _expanded(model, rules)
    # What is gathered at once only saves memory: it stays whole where it cannot be shared evenly.
    head = _name_of(model, model.get_output_embeddings())
    parameters = dict(model.named_parameters())
    whole = {
        name.rpartition(".")[0]
        for name, style in styles.items()
        if style == GATHERED and name in parameters and parameters[name].shape[0] % size
    } - {head}
    return {
        name: style
        for name, style in styles.items()
        if name not in whole and name.rpartition(".")[0] not in whole
    }


def _expert_styles(model: PreTrainedModel, size: int, section: str) -> dict[str, str]:
    prefix = _name_of(model, model.get_decoder()) + "."
    dispatched = {rule for rule, style in (model.ep_plan or {}).items() if style == "ep_dispatch_experts"}
    rules = {
        rule: style
        for rule, style in (model.ep_plan or {}).items()
        if rule.startswith(prefix) and (rule in dispatched or rule.rpartition(".")[0] in dispatched)
    }
    styles = _expanded(model, rules)
    if model.get_decoder().config.model_type not in EXPERT or "grouped_gemm" not in styles.values():
        raise _no_plan(model, f"{section}.expert {size}", "expert")
    return styles


def _no_plan(model: PreTrainedModel, setting: str, kind: str) -> RecipeError:
    return RecipeError(
        f"{setting}: no plan of {kind} parallelism for {type(model).__name__} with the text model "
        f"{model.get_decoder().config.model_type!r} is known to be right; docs/models.md has those that are. Leave "
        "the setting out; FSDP2 shards every family"
    )


def _expanded(model: PreTrainedModel, rules: Mapping[str, str]) -> dict[str, str]:
    """The styles of modules and of their parameters by their own names, in place of ``layers.*``."""
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        style = rules.get(_generic(name))
        for leaf, _ in module.named_parameters(recurse=False):
            own = rules.get(_generic(f"{name}.{leaf}"), style)
            if own is not None:
                styles[f"{name}.{leaf}"] = own
        if style is not None:
            styles[name] = style
    return styles


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _tied_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return _name_of(model, head) if head.weight is model.get_input_embeddings().weight else None


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def _require_even(model: PreTrainedModel, styles: Mapping[str, str], size: int, setting: str) -> None:
    """Raises   RecipeError  naming the first tensor that cannot be shared, and the numbers of ranks that could"""
    counts = _counts(model, styles)
    odd = next((name for name, (count, _) in counts.items() if count % size), None)
    if odd is not None:
        shared = math.gcd(*(count for count, _ in counts.values()))
        possible = [str(number) for number in range(1, shared + 1) if shared % number == 0]
        raise RecipeError(
            f"{setting} {size}: {odd} has {counts[odd][0]} {counts[odd][1]}, which {size} ranks cannot share evenly. "
            f"Choose one of {', '.join(possible)}"
        )


def _counts(model: PreTrainedModel, styles: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Of each weight that is split, how many parts there are to be shared, and of what."""
    modules, counts = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        style = styles.get(name)
        if style not in SPLIT_DIM or parameter.ndim < 2:
            continue
        above, _, projection = name.rpartition(".")[0].rpartition(".")
        unit, what = 1, "experts" if style == "grouped_gemm" else "rows or columns"
        if projection in IN_HEADS:
            unit, what = getattr(modules[above], "head_dim", 1), "heads"
        elif style.startswith("packed"):
            unit = 2
        counts[name] = (parameter.shape[SPLIT_DIM[style]] // unit, what)
    return counts


def _count_own_heads(attention: nn.Module, size: int) -> None:
    """Some families' attention shapes its queries by a number of heads that it keeps."""
    for name in HEAD_COUNTS:
        if isinstance(number := getattr(attention, name, None), int):
            setattr(attention, name, number // size)


def _sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Transformers' own way adds up ``.grad``, and so counts what earlier microbatches left there several times."""
    forward = module.forward

    def summed(*args: Any, **kwargs: Any) -> Any:
        with _parameters_with_summed_gradients(module, group):
            return forward(*args, **kwargs)

    module.forward = summed


@contextmanager
def _parameters_with_summed_gradients(module: nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    own: dict[str, Any] = dict(module._parameters)
    stand_ins = {name: _SummedGradient.apply(parameter, group) for name, parameter in own.items()}
    module._parameters.update(stand_ins)
    try:
        yield
    finally:
        module._parameters.update(own)


class _SummedGradient(torch.autograd.Function):
    """The same tensor; its gradient is the sum over the group's."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None
