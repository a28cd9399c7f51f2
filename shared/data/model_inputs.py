"""What a processor returns, sorted: what there is for each token, and what there is for pictures.

    per_token, per_picture = sorted_inputs(processor, processor(text=[prompt], images=[picture]))
    per_token = continued(per_token, num_tokens=5, kinds=answer_kinds(processor))

Legend: S tokens of one example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.errors import RecipeError

PREFIX_LM = {"PaliGemmaProcessor"}  # whose models look both ways wherever token_type_ids are 0
OURS = {"attention_mask", "labels"}  # made in collation, of what is known here


def sorted_inputs(processor: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per token, (S, ...) each, and per picture, as they are: what the image processor makes is for pictures.

    Shapes   inputs: of one example, ``input_ids`` (1, S) among them

    Raises   RecipeError  when there is something that is no tensor
    """
    per_token, per_picture = {}, {}
    for name, value in inputs.items():
        if name in OURS:
            continue
        if not isinstance(value, Tensor):
            raise RecipeError(
                f"{type(processor).__name__}: its {name} is a {type(value).__name__}, and cannot be put into a batch "
                "with those of other examples. This model cannot be used"
            )
        if _is_per_token(name, value, processor, inputs["input_ids"]):
            per_token[name] = value[0]
        else:
            per_picture[name] = value
    return per_token, per_picture


def _is_per_token(name: str, value: Tensor, processor: Any, input_ids: Tensor) -> bool:
    """Shapes alone do not tell: a picture may have as many patches as its example has tokens."""
    if name in processor.image_processor.model_input_names or value.is_floating_point():
        return False
    return value.shape[:2] == input_ids.shape


def answer_kinds(processor: Any) -> dict[str, int]:
    """What an answer's tokens are marked with where it is not 0, plain text.

    In a prefix language model 0 is a part of the prefix, in which all tokens see each other: an answer of zeros
    would be read before it is predicted.
    """
    return {"token_type_ids": 1} if type(processor).__name__ in PREFIX_LM else {}


def continued(
    per_token: Mapping[str, Tensor], num_tokens: int, kinds: Mapping[str, int]
) -> dict[str, Tensor]:
    """The same with that many tokens of an answer behind it, without ids.

    A mask over pictures, of more than one axis, stays what it was for the prompt's last token.
    """

    def tail(name: str, value: Tensor) -> Tensor:
        if value.ndim > 1:
            return value[-1:].expand(num_tokens, *value.shape[1:])
        return value.new_full((num_tokens,), kinds.get(name, 0))

    return {name: torch.cat([value, tail(name, value)]) for name, value in per_token.items()}
