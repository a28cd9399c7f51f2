"""``loss.visual_weight``: positions weigh more in training where the pictures told the teacher the token.

    weight = VisualWeight.of(recipe, cache, keys)        # keys of the training rows
    weight.of_positions(cache.label_gains(rows))         # (N,)

A gain g is what the pictures add to the log-prob of the token.  Of its probability with the pictures, the part
u = 1 - exp(-g) is lost without them: between 0 and 1, however sure the teacher is.  The weight is
(1 - a) + a u / mean(u), with a the recipe's.  The mean is over the training rows and known before the first step,
so that a weight depends on no batch, rank or microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shared.cache import Cache
from shared.cache.index import Keys, as_key_array, split_keys
from shared.errors import CacheMismatchError
from shared.recipes import Recipe

MAX_ROWS = (
    4096  # that the mean is taken over: it sets the scale alone, and each may cost a shard of a remote cache
)
ROWS_TOGETHER = 256


@dataclass(frozen=True)
class VisualWeight:
    """share  a, above 0 and up to 1; mean  of u over the training rows, above 0"""

    share: float
    mean: float

    @classmethod
    def of(cls, recipe: Recipe, cache: Cache, keys: Keys) -> VisualWeight | None:
        """None where the recipe has no such weight; ``keys`` of the training rows, in their order.

        Raises   CacheMismatchError  when no token of these rows is likelier with the pictures
        """
        if not recipe.loss.visual_weight:
            return None
        held = as_key_array(keys)
        chosen = split_keys(held[np.arange(min(len(held), MAX_ROWS)) * len(held) // min(len(held), MAX_ROWS)])
        total, count = 0.0, 0
        for start in range(0, len(chosen), ROWS_TOGETHER):
            lost_N = lost_without(_gains(cache, chosen[start : start + ROWS_TOGETHER])).double()
            total, count = total + float(lost_N.sum()), count + len(lost_N)
        if total <= 0:
            raise CacheMismatchError(
                f"{cache.where}: loss.visual_weight: no token of {len(chosen)} training rows is likelier with the "
                "pictures than without. Leave it out, or capture the cache with a teacher that looks at them"
            )
        return cls(recipe.loss.visual_weight, total / count)

    def of_positions(self, gains_N: Tensor) -> Tensor:
        """Weights (N,) fp32 of positions with these gains (nats)."""
        return (1 - self.share) + self.share * lost_without(gains_N) / self.mean


def lost_without(gains_N: Tensor) -> Tensor:
    """The part (N,) of the token's probability that it loses without the pictures; 0 where it loses none."""
    return -(-gains_N.clamp_min(0)).expm1()


def _gains(cache: Cache, keys: list[bytes]) -> Tensor:
    return cache.label_gains(cache.rows(keys))  # type: ignore[arg-type]  # its own rows
