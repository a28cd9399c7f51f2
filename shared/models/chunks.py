"""How many answer positions pass a head together, where the recipe leaves it open.

Numbers do not depend on it, time and memory do.  On a GPU the head's gradient is read and written once a chunk: below
about a thousand positions that takes longer than the product itself (docs/loss.md).  On a CPU 512 rows of logits are
as fast as more.
"""

from __future__ import annotations

from typing import Literal

import torch

Chunk = int | Literal["auto"]

ON_CPU = 512
MAX_POSITIONS = 2048
STEP = 256
BYTES_PER_LOGIT = 8  # fp32, and one copy
SHARE_OF_MEMORY = 16  # one part in so many of the device's


def chunk_positions(setting: Chunk, num_ids: int, device: torch.device) -> int:
    """``setting``, or for ``auto`` what suits a head of ``num_ids`` rows on that device."""
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return ON_CPU
    return automatic_chunk(num_ids, torch.cuda.get_device_properties(device).total_memory)


def automatic_chunk(num_ids: int, memory_bytes: int) -> int:
    """A multiple of 256 from 256 to 2,048 whose logits take at most a sixteenth of a GPU's memory."""
    affordable = memory_bytes // SHARE_OF_MEMORY // (num_ids * BYTES_PER_LOGIT)
    return max(STEP, min(MAX_POSITIONS, affordable // STEP * STEP))
