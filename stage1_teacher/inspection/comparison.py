"""How far the cache's targets are from the teacher's distributions, over the positions of an audit.

    comparison = Comparison.of(teacher, encoded, targets, hidden_ND, again_ND, tail="ghost", seed=0)
    comparison.at(1.0)

What a student feels is the gradient of the head, as the trainer's loss makes it.  Its error is measured for a
student that knows how often each token comes and nothing else: q, the mean of the teacher's distributions over
the audited positions.  Hidden states are the teacher's, projected to at most 128 dimensions, which keeps norms
and angles.

Legend: N positions, n of a block, V vocabulary, C projected hidden dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.data.collation import Encoded
from shared.progress import progress
from shared.sparse import SparseTargets
from stage1_teacher.capturing.teacher import Teacher
from stage1_teacher.inspection.head_gradient import BLOCK, HeadGradients, Measured, pull

PROJECTED = 128
WHOLE_TAILS = ("ghost", "uniform")  # which leave no token without mass


@dataclass(frozen=True)
class AtTemperature:
    """How far the cache is from the teacher at one temperature.

    top1_agreement    share of positions where no entry weighs more than the teacher's most likely token
    kept_mass         sum of the weights of a position
    logprob_bias      mean over positions of sum_v (p^ - p)(v) log p(v), nats: zero in expectation where the
                      targets are unbiased; ``logprob_bias_error`` is its standard error over examples, None for one
    answer_bias       mean of (p^ - p) at the answer's token, and its standard error
    kl                KL(teacher || what the loss takes the cache for), nats: kept tokens, the rest spread evenly by
                      the tail mode ``uniform``, and as q has it by ``ghost``.  None where tokens are left
                      without mass, as by a draw, ``renormalize`` and ``drop``: it would be infinite
    gradient_error    by number of positions, of each in ``BATCHES``: relative error of the head's gradient, mean
                      over such batches; it falls with their size, so it is None where there were too few positions
    gradient_cosine   the same, of the angle between both gradients
    """

    temperature: float
    top1_agreement: Measured
    kept_mass: Measured
    logprob_bias: Measured
    logprob_bias_error: float | None
    answer_bias: Measured
    answer_bias_error: float | None
    kl: Measured
    gradient_error: dict[int, Measured]
    gradient_cosine: dict[int, Measured]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Positions in random order, so that a batch of them holds many examples, as a training step does."""

    teacher: Teacher
    hidden_ND: Tensor
    again_ND: Tensor | None  # of the same positions, from other batches
    features_NC: Tensor
    labels_N: Tensor
    example_N: Tensor
    targets: SparseTargets
    tail: str

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        encoded: Sequence[Encoded],
        targets: SparseTargets,
        hidden_ND: Tensor,
        again_ND: Tensor | None,
        *,
        tail: str,
        seed: int,
    ) -> Comparison:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(hidden_ND), generator=generator)
        counts = torch.tensor([one.num_positions for one in encoded])
        width = hidden_ND.shape[1]
        features_ND = hidden_ND.float()
        if width > PROJECTED:
            features_ND = (
                features_ND @ torch.randn(width, PROJECTED, generator=generator) / math.sqrt(PROJECTED)
            )
        return cls(
            teacher=teacher,
            hidden_ND=hidden_ND[order],
            again_ND=None if again_ND is None else again_ND[order],
            features_NC=features_ND[order],
            labels_N=torch.cat([one.answer_ids for one in encoded])[order],
            example_N=torch.arange(len(encoded)).repeat_interleave(counts)[order],
            targets=targets.select(order),
            tail=tail,
        )

    @torch.inference_mode()
    def at(self, temperature: float) -> AtTemperature:
        """Two passes: the mean distribution, which is the student's, then everything against it."""
        total_V = torch.zeros(self.teacher.num_token_ids, dtype=torch.float64)
        for block in self._blocks():
            total_V += self._probs(self.hidden_ND, block, temperature).sum(0, dtype=torch.float64)
        student_V = total_V / len(self.labels_N)
        columns: dict[str, list[Tensor]] = {}

        def add(figures: dict[str, Tensor], name: str) -> None:
            for figure, values_n in figures.items():
                columns.setdefault(f"{figure} {name}", []).append(values_n)

        gradients = HeadGradients(len(self.labels_N))
        for block in progress(
            list(self._blocks()), desc=f"comparing at {temperature:g}", unit="block", leave=False
        ):
            live_nV = self._probs(self.hidden_ND, block, temperature)
            again_nV = None if self.again_ND is None else self._probs(self.again_ND, block, temperature)
            pull_nV = pull(self._targets(block), student_V, temperature=temperature, tail=self.tail)
            found = self._figures(live_nV, self._kept(block, temperature), block)
            if not self.targets.policy.is_sampled and self.tail in WHOLE_TAILS:
                found["kl"] = _kl(live_nV, (student_V + pull_nV).float())
            add(found, "cache")
            if again_nV is not None:
                add(self._figures(live_nV, again_nV, block) | {"kl": _kl(live_nV, again_nV)}, "floor")
            gradients.add(
                self.features_NC[block],
                live_nV=(live_nV - student_V).float(),
                cache_nV=pull_nV.float(),
                floor_nV=None if again_nV is None else (again_nV - student_V).float(),
            )
        return self._result(
            temperature, {name: torch.cat(parts) for name, parts in columns.items()}, gradients
        )

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.labels_N), BLOCK):
            yield slice(start, min(start + BLOCK, len(self.labels_N)))

    def _probs(self, hidden_ND: Tensor, block: slice, temperature: float) -> Tensor:
        """The teacher's distributions (n, V) fp32."""
        logprobs_nV = self.teacher.logprobs(hidden_ND[block].to(self.teacher.device)).cpu()
        return (logprobs_nV / temperature).softmax(-1) if temperature != 1.0 else logprobs_nV.exp()

    def _targets(self, block: slice) -> SparseTargets:
        return self.targets.slice(block.start, block.stop)

    def _kept(self, block: slice, temperature: float) -> Tensor:
        """The cache's weights, (n, V) fp32."""
        part = self._targets(block)
        kept_nV = torch.zeros(part.num_positions, self.teacher.num_token_ids)
        kept_nV.index_put_((part.position_index, part.ids.long()), part.weights(temperature), accumulate=True)
        return kept_nV

    def _figures(self, live_nV: Tensor, other_nV: Tensor, block: slice) -> dict[str, Tensor]:
        """One number a position, (n,), of each figure."""
        difference_nV = other_nV - live_nV
        labels_n1 = self.labels_N[block, None]
        is_top_n1 = other_nV.gather(1, live_nV.argmax(-1, keepdim=True)) == other_nV.amax(-1, keepdim=True)
        return {
            "top1": is_top_n1.squeeze(1).float(),
            "mass": other_nV.sum(-1),
            "logprob": (difference_nV * _log(live_nV)).sum(-1),
            "answer": difference_nV.gather(1, labels_n1).squeeze(1),
        }

    def _result(
        self, temperature: float, columns: dict[str, Tensor], gradients: HeadGradients
    ) -> AtTemperature:
        def both(figure: str) -> Measured:
            found = [columns.get(f"{figure} {name}") for name in ("cache", "floor")]
            cache, floor = (None if one is None else one.double().mean().item() for one in found)
            return Measured(cache, floor)

        return AtTemperature(
            temperature=temperature,
            top1_agreement=both("top1"),
            kept_mass=both("mass"),
            logprob_bias=both("logprob"),
            logprob_bias_error=self._standard_error(columns["logprob cache"]),
            answer_bias=both("answer"),
            answer_bias_error=self._standard_error(columns["answer cache"]),
            kl=both("kl"),
            gradient_error=gradients.errors(),
            gradient_cosine=gradients.cosines(),
        )

    def _standard_error(self, values_N: Tensor) -> float | None:
        """Of the mean over positions: examples are independent, their positions are not.  None for one example."""
        num_examples = int(self.example_N.max()) + 1
        if num_examples == 1:
            return None
        centred_N = values_N.double() - values_N.double().mean()
        sums_B = torch.zeros(num_examples, dtype=torch.float64).index_add_(0, self.example_N, centred_N)
        return sums_B.norm().item() / len(values_N)


def _kl(live_nV: Tensor, other_nV: Tensor) -> Tensor:
    """KL(live || other), (n,)."""
    return (live_nV * (_log(live_nV) - _log(other_nV))).sum(-1)


def _log(probs_nV: Tensor) -> Tensor:
    return probs_nV.clamp_min(1e-30).log()
