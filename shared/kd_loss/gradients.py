"""Gradients that were made in the forward pass: how they are summed up, and handed to autograd.

Backward has only to multiply them by the incoming gradient.  It does so in place where autograd asks once,
and narrows them to their inputs' dtype in the same memory, so that backward needs none of its own: it runs
when the activations of the whole model are still alive.  A wide sum lies in pieces: its narrow gradient fits into
the first, and the memory of the others is free when backward of the loss has ended.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 2**20  # elements that are copied aside
_PRODUCT_ROWS = 2**14  # vocabulary ids at a time where products cannot be added in fp32
_ALIGNED_ROWS = 16  # so that what lies behind a piece of the head is as well aligned as the head


def zero_pieces(like_VD: Tensor, sum_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """(V, D) zeros of ``sum_dtype``, cut by rows where they are to be narrowed to ``dtype`` in the first piece."""
    num_rows, ratio = len(like_VD), max(1, sum_dtype.itemsize // dtype.itemsize)
    num_first = min(num_rows, -(-num_rows // ratio // _ALIGNED_ROWS) * _ALIGNED_ROWS)
    sizes = [num_first, num_rows - num_first] if num_first < num_rows else [num_rows]
    return [like_VD.new_zeros(size, *like_VD.shape[1:], dtype=sum_dtype) for size in sizes]


def scaled(
    grads: Sequence[Tensor | Sequence[Tensor] | None],
    dtypes: Sequence[torch.dtype | None],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Each gradient, or its ``zero_pieces``, times the incoming one, in its input's dtype; to be called inside
    ``backward``.

    Raises   RuntimeError  under ``create_graph``: these gradients have no graph, so terms would be missing silently
    Holds    correct when autograd asks again (``retain_graph``); in place, with no new memory, when not
    """
    if torch.is_grad_enabled():  # inside ``backward`` under create_graph alone
        raise RuntimeError(
            "the gradients of this loss are made in its forward pass and cannot be differentiated again: leave out "
            "create_graph. KDLoss from a dense teacher with chunk_size=0 on one rank can"
        )
    asked_again = torch._C._autograd._get_current_graph_task_keep_graph()
    scaled_grads: list[Tensor | None] = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is None or dtype is None:
            scaled_grads.append(None)
        else:
            pieces = [grad] if isinstance(grad, Tensor) else grad
            pieces = [_multiply_(one.clone() if asked_again else one, grad_output) for one in pieces]
            scaled_grads.append(_joined_(pieces, dtype))
    return scaled_grads


def _joined_(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``zero_pieces`` that were added to, as one tensor of ``dtype`` in the memory of the first."""
    first, *others = pieces
    narrow = narrow_(first, dtype)
    if not others:
        return narrow
    shape = (sum(map(len, pieces)), *first.shape[1:])
    whole = narrow.new_empty(0).set_(narrow.untyped_storage(), 0, shape, narrow.stride())
    start = len(first)
    for one in others:
        whole[start : start + len(one)] = one
        start += len(one)
    return whole


def _multiply_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in place; narrow ones through fp32: CUDA would round the factor first, which biases all."""
    if grad.dtype.itemsize >= factor.dtype.itemsize:
        return grad.mul_(factor)
    for block in grad.view(-1).split(_BLOCK):
        block.copy_(block.to(factor.dtype) * factor)
    return grad


def narrow_(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide`` as ``dtype`` in its own memory, which must not be read as ``wide`` afterwards.

    A narrow element lies at or before the wide one it is made of, so blocks of doubling size never write
    over what is still to be read.
    """
    if dtype.itemsize >= wide.dtype.itemsize or not wide.is_contiguous() or wide.storage_offset() != 0:
        return wide.to(dtype)
    source = wide.view(-1)
    narrow = torch.empty(0, dtype=dtype, device=wide.device).set_(
        wide.untyped_storage(), 0, source.shape, (1,)
    )
    narrow[:_BLOCK] = source[:_BLOCK].clone()
    start = _BLOCK
    while start < source.numel():
        narrow[start : 2 * start] = source[start : 2 * start]
        start *= 2
    return narrow.view(wide.shape)


def add_to_pieces_(pieces: Sequence[Tensor], logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """``add_product_`` to a gradient of the head that ``zero_pieces`` cut."""
    start = 0
    for piece in pieces:
        add_product_(piece, logits_CV[:, start : start + len(piece)], hidden_CD)
        start += len(piece)


def add_product_(grad_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """grad_VD += logits_CV.T @ hidden_CD, summed in the dtype of ``grad_VD`` (fp32 for bf16 factors)."""
    if logits_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(logits_CV.t(), hidden_CD)
    elif _adds_wide_products(logits_CV.device, logits_CV.dtype):
        torch.addmm(grad_VD, logits_CV.t(), hidden_CD, out_dtype=grad_VD.dtype, out=grad_VD)
    else:
        hidden_CD = hidden_CD.to(grad_VD.dtype)
        for start in range(0, grad_VD.shape[0], _PRODUCT_ROWS):
            rows = slice(start, start + _PRODUCT_ROWS)
            grad_VD[rows].addmm_(logits_CV[:, rows].to(grad_VD.dtype).t(), hidden_CD)


@functools.cache
def _adds_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` can be added to an fp32 matrix: on CUDA, by some versions of PyTorch.

    The log is told, as the other way takes longer.
    """
    able = _can_add_wide_products(device, dtype)
    way = "one product" if able else f"fp32 copies, {_PRODUCT_ROWS} ids at a time"
    logging.getLogger(__name__).info(
        "the head's gradient on %s: %s summed in fp32 by %s", device.type, dtype, way
    )
    return able


def _can_add_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    total = torch.zeros(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor.t(), factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 16).all())
