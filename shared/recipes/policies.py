"""What the cache keeps of a teacher's distribution: the recipe entry ``cache.policy``.

A policy is part of a cache's identity.  The mathematics is in ``docs/targets.md``; ``shared.sparse`` carries
it out.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from shared.recipes.schema import Section

# Where a deterministic policy's missing mass goes; the sampled policies miss none.
TAIL_MODES = ("ghost", "uniform", "renormalize", "drop")
DEFAULT_TAIL = "ghost"
VisualGain = Literal["blurred", "removed"]  # what becomes of pictures in the teacher's second pass


def ghost_of_several(kind: str) -> str:
    """Why caches of that policy cannot be mixed with the tail mode ``ghost``."""
    return (
        f"tail ghost of a mix of {kind} caches: a teacher's bucket is for the tokens that it did not keep, which are "
        "others for each teacher, so buckets do not add up. Set loss.tail to uniform, renormalize or drop, or mix "
        "caches of a sampled policy (threshold, random)"
    )


# Of these, what a student with another tokenizer can use: the others give mass to tokens that were not kept.
TAILS_OF_ANOTHER_VOCABULARY = ("renormalize", "drop")


def tail_of_another_vocabulary(kind: str, tail: str) -> str:
    """Why a cache of that policy cannot be regrouped with that tail mode."""
    return (
        f"tail {tail} of a {kind} cache and a student with another tokenizer: what the teacher did not keep has no "
        "text, so it is not known which of the student's tokens should get it. Set loss.tail to renormalize or drop, "
        "or use a cache of a sampled policy (threshold, random)"
    )


class _Policy(Section):
    @property
    def is_sampled(self) -> bool:
        """Whether the targets are drawn, and unbiased; otherwise they are cut off, and have a tail."""
        return False


class Threshold(_Policy):
    """Keep each token above ``tau``; draw the others, each draw standing for a mass of ``tau``.

    Kept probabilities are rounded, without bias, to fp16 log-probs or to ``levels``: fewer of these, as many
    as the noise of the draws leaves any use for, in half the bytes.
    """

    kind: Literal["threshold"] = "threshold"
    tau: Annotated[float, Field(ge=1e-6, le=1)] = 1 / 512
    """The dial between the size of the cache and the noise of the targets."""
    values: Literal["levels", "fp16"] = "levels"
    """How probabilities are stored. `levels` is for temperature 1 alone; several temperatures need `fp16`."""

    @property
    def is_sampled(self) -> bool:
        return True

    @property
    def log_tau(self) -> float:
        """The log of the mass that a draw stands for: that of ``tau``, rounded to fp16."""
        return float(np.float16(math.log(self.tau)))


class TopK(_Policy):
    """Keep the ``k`` most probable tokens."""

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1)]
    """Tokens kept at each position."""


class TopP(_Policy):
    """Keep the fewest tokens, most probable first, whose mass reaches ``p``; at most ``max_k`` of them."""

    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, le=1)]
    """Mass to keep."""
    max_k: Annotated[int, Field(ge=1)] = 1024
    """Tokens kept at each position, at most."""


class Random(_Policy):
    """Draw ``draws`` tokens with replacement and keep how often each was drawn (arXiv 2503.16870)."""

    kind: Literal["random"] = "random"
    draws: Annotated[int, Field(ge=1, le=65535)]
    """Draws at each position."""

    @property
    def is_sampled(self) -> bool:
        return True


Policy = Annotated[Threshold | TopK | TopP | Random, Field(discriminator="kind")]
