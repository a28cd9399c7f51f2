"""The work on one chunk's logits: normaliser, CE, KD, and the gradient written over the logits.

On a GPU one Triton kernel does it; everywhere else, where Triton cannot compile, and for what the kernels do not
cover (a vocabulary split over ranks), PyTorch does.  On a CPU the rows are taken a few at a time, so that they stay
in its cache between the passes.

C positions of a chunk, V vocabulary of the head, or of this rank's part.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shared.errors import is_out_of_memory, shortened
from shared.kd_loss.teacher import SparseTeacher
from shared.kd_loss.tile import LossSettings, tile_loss_
from shared.kd_loss.vocab_parallel import VocabShard

TILE_BYTES = 2**21
PADDED_TO = 16  # elements: what the kernel reads and writes at once, in any dtype


def logits_buffer(num_rows: int, num_ids: int, like: Tensor) -> Tensor:
    """Memory (num_rows, W) for a chunk's logits, ``num_ids`` first; W is larger where that makes a GPU faster."""
    width = num_ids if like.device.type != "cuda" else -(-num_ids // PADDED_TO) * PADDED_TO
    return like.new_empty(num_rows, width)


def chunk_loss_(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    teacher: SparseTeacher | None,
    first: int,
    settings: LossSettings,
    *,
    with_grad: bool,
    row_width: int | None = None,
    label_logprobs_C: Tensor | None = None,
    kd_ratios_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CE and KD of a chunk; its logits are consumed: overwritten by their gradient if ``with_grad``.

    row_width  of a ``logits_buffer`` that they are part of; what lies beyond V is overwritten, too
    Shapes   logits_CV (C, V), rows contiguous, any float dtype; labels_C (C,) int64 inside the vocabulary;
             weights_C (C,) of the gradient's rows, None for one
             the chunk's positions are ``first`` to ``first + C`` of the teacher's
             label_logprobs_C (C,) the teacher's log-prob of labels that the student drew, else NaN: adds the gradient
             of ``settings.reverse_kl``
             kd_ratios_C (C,) fp32, in the place of ``settings.kd_ratio``
    Returns  ce_C, kd_C (C,) nats, fp32 (fp64 for fp64 logits); KD times T squared; both without weights
    Holds    kernel and PyTorch agree
    """
    arguments = (logits_CV, labels_C, weights_C, teacher, first, settings)
    optional: dict[str, Any] = {"label_logprobs_C": label_logprobs_C, "kd_ratios_C": kd_ratios_C}
    if logits_CV.device.type == "cuda" and fits_kernel(logits_CV.dtype, settings):
        with torch.cuda.device(logits_CV.device):  # Triton launches on the current one, whatever the tensors'
            kernel = _kernel(logits_CV.device)
            if kernel is not None:
                return kernel.chunk_loss_(*arguments, with_grad=with_grad, row_width=row_width, **optional)
    return chunk_loss_torch_(*arguments, with_grad=with_grad, **optional)


def fits_kernel(dtype: torch.dtype, settings: LossSettings) -> bool:
    """Whether a Triton kernel covers this loss."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and settings.shard is None


@functools.cache
def _kernel(device: torch.device) -> ModuleType | None:
    """The kernel's module, where Triton is installed and works: it comes with the CUDA builds of PyTorch.

    It compiles with a C compiler and Python's headers, which a machine may lack: the first launch tells.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernel = importlib.import_module("shared.kd_loss.triton_kernel")
        labels_C = torch.zeros(1, dtype=torch.int64, device=device)
        settings = LossSettings(kd_ratio=0.0, temperature=1.0, num_vocab_ids=PADDED_TO)
        logits_CV = torch.zeros(1, PADDED_TO, device=device)
        kernel.chunk_loss_(logits_CV, labels_C, None, None, 0, settings, with_grad=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = shortened((str(error).strip() or "nothing more is said").splitlines()[0])
        logging.getLogger(__name__).warning(
            "the loss's Triton kernel cannot be used on this machine (%s: %s); PyTorch makes the loss, more slowly",
            type(error).__name__,
            why,
        )
        return None
    return kernel


def chunk_loss_torch_(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    teacher: SparseTeacher | None,
    first: int,
    settings: LossSettings,
    *,
    with_grad: bool,
    label_logprobs_C: Tensor | None = None,
    kd_ratios_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``chunk_loss_`` in PyTorch, on any device."""
    num_rows = logits_CV.shape[0]
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    ce_C = torch.zeros(num_rows, dtype=dtype, device=logits_CV.device)
    kd_C = torch.zeros_like(ce_C)
    tile = rows_per_tile(logits_CV, dtype, settings.shard)
    for start in range(0, num_rows, tile):
        stop = min(start + tile, num_rows)
        part_RV = logits_CV[start:stop]
        tile_RV = part_RV.to(dtype).contiguous()
        ce_C[start:stop], kd_C[start:stop] = tile_loss_(
            tile_RV,
            labels_C[start:stop],
            None if weights_C is None else weights_C[start:stop].to(dtype),
            None if teacher is None else teacher.slice(first + start, first + stop),
            settings,
            with_grad=with_grad,
            label_logprobs_R=None if label_logprobs_C is None else label_logprobs_C[start:stop].to(dtype),
            kd_ratios_R=None if kd_ratios_C is None else kd_ratios_C[start:stop].to(dtype),
        )
        if with_grad and tile_RV is not part_RV:
            part_RV.copy_(tile_RV)
    return ce_C, kd_C


def rows_per_tile(logits_CV: Tensor, dtype: torch.dtype, shard: VocabShard | None) -> int:
    """How many rows to work on at a time; all of them where that costs launches or collectives."""
    num_rows, num_ids = logits_CV.shape
    if logits_CV.device.type != "cpu" or shard is not None:
        return max(1, num_rows)
    return max(1, TILE_BYTES // (num_ids * dtype.itemsize))
