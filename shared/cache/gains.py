"""What the pictures gave each token of an answer, as caches of ``cache.visual_gain`` have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import CacheFormatError, CacheMismatchError


class Gained(Protocol):
    """A row of a cache, or of a mix of them."""

    @property
    def key(self) -> bytes: ...

    @property
    def label_gain(self) -> npt.NDArray[np.floating] | None: ...


def gains_of(rows: Sequence[Gained], *, where: str) -> torch.Tensor:
    """By how much the pictures raise the log-prob of each token, (N,) fp32 nats, one row after the other.

    where  opens the message
    Raises   CacheMismatchError  when a row has none
             CacheFormatError    when one is not finite
    """
    found = [np.empty(0, np.float32)]
    for row in rows:
        gain = row.label_gain
        if gain is None:
            raise CacheMismatchError(
                f"{where}: does not say what the pictures gave its answers. Capture a cache with cache.visual_gain: "
                "blurred."
            )
        if not np.isfinite(gain).all():
            raise CacheFormatError(
                f"{where}, example {row.key.hex()}: a label_gain is not finite. Run teacher-cache verify, and "
                "capture the cache again."
            )
        found.append(gain.astype(np.float32))
    return torch.from_numpy(np.concatenate(found))
