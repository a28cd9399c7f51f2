"""The identity of a model's weights: their values, not the files that hold them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weight_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over names, types, shapes and bytes of all parameters and buffers, as they are loaded.

    Holds    independent of how the files were cut; another ``dtype`` gives another fingerprint, as it gives
             other targets
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()
