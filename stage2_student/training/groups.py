"""CE and KL by place in the answer, by kind of question and by teacher: where a student is far from its teacher.

And means over rows, in which a long answer counts no more than a short one: a few greedy answers that repeat
themselves to the limit can have half of all positions.

groups = Groups()
groups.add(microbatch, measured.ce_N, measured.kl_N)
groups.of_all_ranks(world).to_json()      # {"by_place": {"names": [1, 2, ...], "ce": [...], ...}, "by_kind": {...}}
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.runtime import World
from stage2_student.training.feed import Microbatch

MAX_PLACES = 64  # of an answer; what comes later is counted by kind alone
NUM_SUMS = 4  # positions, CE, KL, the teacher's CE


def _zeros() -> Tensor:
    return torch.zeros(NUM_SUMS, dtype=torch.float64)


@dataclass
class Groups:
    """Sums over the positions of each group; nats.

    by_place    (places, 4) fp64; the teacher's CE is not known by place
    by_kind     of questions, each (4,) fp64
    by_teacher  of the targets, each (4,) fp64; empty where one has taught all
    rows        (4,) fp64: number of rows, sums of their means
    """

    by_place: Tensor = field(default_factory=lambda: torch.zeros(MAX_PLACES, NUM_SUMS, dtype=torch.float64))
    by_kind: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_zeros))
    by_teacher: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_zeros))
    rows: Tensor = field(default_factory=_zeros)
    has_kl: bool = False

    def add(self, microbatch: Microbatch, ce_N: Tensor, kl_N: Tensor | None) -> None:
        """Makes the host wait for the device."""
        self.has_kl |= kl_N is not None
        kl_N = torch.zeros_like(ce_N) if kl_N is None else kl_N
        sums_N4 = (
            torch.stack([torch.ones_like(ce_N), ce_N, kl_N, torch.zeros_like(ce_N)], dim=1).double().cpu()
        )
        places_N = torch.tensor(microbatch.places, dtype=torch.int64)
        is_early_N = places_N < MAX_PLACES
        self.by_place.index_add_(0, places_N[is_early_N], sums_N4[is_early_N])
        sums_of_examples = [own_L4.sum(0) for own_L4 in sums_N4.split(microbatch.lengths)]
        for kind, length, sums_4 in zip(microbatch.kinds, microbatch.lengths, sums_of_examples, strict=True):
            if length:
                self.rows += sums_4 / length
            if kind and length:
                self.by_kind[kind] += sums_4
        if microbatch.teachers:  # none of an example that counts for nothing
            for teacher, ce, sums_4 in zip(
                microbatch.teachers, microbatch.teacher_ces, sums_of_examples, strict=True
            ):
                self.by_teacher[teacher] += sums_4 + torch.tensor([0, 0, 0, ce], dtype=torch.float64)

    def of_all_ranks(self, world: World) -> Groups:
        """Called by all ranks."""
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(
            gathered, (self.by_place, dict(self.by_kind), dict(self.by_teacher), self.rows, self.has_kl)
        )
        total = Groups()
        for by_place, by_kind, by_teacher, rows, has_kl in gathered[:: world.tensor]:
            total.by_place += by_place
            for kind, sums in by_kind.items():
                total.by_kind[kind] += sums
            for teacher, sums in by_teacher.items():
                total.by_teacher[teacher] += sums
            total.rows += rows
            total.has_kl |= has_kl
        return total

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Means over the positions of each group that has any, and over rows; ``kl`` only where it was measured."""
        places = [place for place in range(MAX_PLACES) if self.by_place[place, 0] > 0]
        kinds, teachers = sorted(self.by_kind), sorted(self.by_teacher)
        found: dict[str, dict[str, Any]] = {
            "by_row": self.of_rows(),
            "by_place": self._means([place + 1 for place in places], [self.by_place[one] for one in places]),
            "by_kind": self._means(kinds, [self.by_kind[kind] for kind in kinds]),
        }
        if not teachers:
            return found
        sums = [self.by_teacher[teacher] for teacher in teachers]
        own = [(ce / count).item() for count, _, _, ce in sums]
        return found | {"by_teacher": self._means(teachers, sums) | {"teacher_ce": own}}

    def of_rows(self) -> dict[str, Any]:
        """Number of rows, and means over rows of their own means over positions; empty where there is no row."""
        count, ce, kl, _ = self.rows.tolist()
        if not count:
            return {}
        return {"rows": round(count), "ce": ce / count} | ({"kl": kl / count} if self.has_kl else {})

    def _means(self, names: list[Any], sums: list[Tensor]) -> dict[str, list[Any]]:
        found = [one.tolist() for one in sums]
        means = {"names": names, "positions": [round(count) for count, *_ in found]}
        means["ce"] = [ce / count for count, ce, *_ in found]
        return means | ({"kl": [kl / count for count, _, kl, _ in found]} if self.has_kl else {})
