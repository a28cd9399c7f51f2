"""Mixtures of experts: the loss that keeps a router from sending all tokens to a few of them.

    router = RouterLoss.of(model)             # None: no experts, or the configuration does not ask for it
    router.weighted(router_logits, mask_BS)   # the loss times the number of tokens that it is of

The function is Transformers' own.  It is a mean over the tokens of a batch, and not linear in them: of a step cut
into microbatches it is the mean over these, each by its tokens.
Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.errors import RecipeError

FUNCTION = "load_balancing_loss_func"  # in the module of each class of Transformers that has such a loss


@dataclass(frozen=True)
class RouterLoss:
    """coefficient  of the loss, beside that of the tokens"""

    coefficient: float
    num_experts: int
    top_k: int
    function: Callable[..., Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterLoss | None:
        """What the model's own forward adds to its loss; None where it adds nothing."""
        text = model.config.get_text_config()
        function = getattr(sys.modules[type(model).__module__], FUNCTION, None)
        coefficient = getattr(text, "router_aux_loss_coef", None)
        if function is None or not coefficient or not getattr(text, "output_router_logits", False):
            return None
        num_experts = getattr(text, "num_experts", None) or text.num_local_experts
        return cls(float(coefficient), int(num_experts), int(text.num_experts_per_tok), function)

    def weighted(self, router_logits: tuple[Tensor, ...], mask_BS: Tensor) -> Tensor:
        """The loss of the tokens in the mask, times their number.

        Shapes   router_logits: of each layer (B * S, experts); returns () fp32
        Holds    without any token zero, with a graph
        """
        num_tokens = mask_BS.sum()
        mask_BS = torch.where(num_tokens > 0, mask_BS, torch.ones_like(mask_BS))
        return self.function(router_logits, self.num_experts, self.top_k, mask_BS) * num_tokens


def num_experts(model: PreTrainedModel) -> int | None:
    """None of a model without any."""
    text = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    found = [getattr(text, name, None) for name in names]
    return next((int(number) for number in found if number), None)


def require_same_router_loss(model: PreTrainedModel, ours: Tensor, own: Tensor | None) -> None:
    """Raises   RecipeError  when the model's own forward has another load-balancing loss than ours"""
    if own is None or not torch.allclose(ours.float(), own.float(), rtol=1e-3, atol=1e-5):
        said = "none" if own is None else f"{own.item():.4g}"
        raise RecipeError(
            f"model class {type(model).__name__}: the load-balancing loss of its router is {said} by its own "
            f"forward, and {ours.item():.4g} as it is computed here. Set output_router_logits to false in its "
            "config.json"
        )
