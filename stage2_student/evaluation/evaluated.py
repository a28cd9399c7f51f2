"""One model's answers to some questions, and what they come to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from stage2_student.evaluation.answer_metrics import Interval, mean_interval
from stage2_student.evaluation.answers import Answer

STUDENT, TEACHER, UNTRAINED = "student", "teacher", "untrained"
LABELS = {
    "accuracy": "right, short",
    "exact_match": "exact, all",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
}


@dataclass(frozen=True)
class Evaluated:
    """One model: its answers, and its losses over the same examples where they could be computed (None where not).

    step        of the run that exported it; None for a model from elsewhere
    soft_ce     with a teacher of another tokenizer, in the place of KL: nats a unit of its mass at shared positions
    by_row      number of rows, and means over rows of their means over positions: rows, ce, kl
    by_teacher  of the targets, where the caches are of several: names, positions, ce, kl, teacher_ce
    """

    name: str
    model: str
    answers: tuple[Answer, ...]
    ce: float | None = None
    kl: float | None = None
    step: int | None = None
    by_teacher: dict[str, list[Any]] = field(default_factory=dict)
    soft_ce: float | None = None
    by_row: dict[str, Any] = field(default_factory=dict)

    def intervals(self, kind: str | None = None) -> dict[str, Interval | None]:
        """Of one kind of question, or of all."""
        some = [one for one in self.answers if kind is None or one.kind == kind]
        short = [one for one in some if one.is_short]

        def interval(chosen: list[Answer], value: Callable[[Answer], float]) -> Interval | None:
            return mean_interval([value(one) for one in chosen], [one.image_sha256 for one in chosen])

        return {
            "accuracy": interval(short, lambda one: float(one.is_right)),
            "exact_match": interval(some, lambda one: float(one.is_right)),
            "token_f1": interval(some, lambda one: one.token_f1),
            "rouge_l": interval(some, lambda one: one.rouge_l),
        }

    @property
    def kinds(self) -> list[str]:
        return sorted({one.kind for one in self.answers if one.kind})

    @property
    def num_cut(self) -> int:
        """Answers that were not at their end after ``max_new_tokens``."""
        return sum(one.is_cut for one in self.answers)

    @property
    def questions(self) -> str:
        """Hex, over what was asked: equal for models that answered the same questions."""
        digest = hashlib.blake2b(digest_size=8)
        for one in self.answers:
            digest.update(repr((one.split, one.image_sha256, one.question, one.reference)).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        def plain(kind: str | None) -> dict[str, Any]:
            return {name: found and asdict(found) for name, found in self.intervals(kind).items()}

        return {
            "model": self.name,
            "folder": self.model,
            "step": self.step,
            "questions": self.questions,
            "num_examples": len(self.answers),
            "num_cut": self.num_cut,
            "ce": self.ce,
            "kl": self.kl,
            **({} if self.soft_ce is None else {"soft_ce": self.soft_ce}),
            **({"by_row": self.by_row} if self.by_row else {}),
            **({"by_teacher": self.by_teacher} if self.by_teacher else {}),
            **plain(None),
            "by_kind": {kind: plain(kind) for kind in self.kinds},
        }
