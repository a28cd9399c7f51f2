"""When a cache pays: what a live teacher costs with every epoch of every student, against one capture.

    costs = TeacherCosts(capture_s=600, live_epoch_s=500, cached_epoch_s=4)
    costs.break_even_epochs                                       # 1.2: of all students together
    costs.live_s(num_students=3, num_epochs=2), costs.cached_s(num_students=3, num_epochs=2)

All times are of the teacher's part alone, on the same devices; the student's own is the same both ways.
Validation, where a live teacher would run as well, is left out, in favour of the live teacher.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TeacherCosts:
    """Seconds: of the capture of all data, and of one epoch over the training split either way."""

    capture_s: float
    live_epoch_s: float
    cached_epoch_s: float

    @property
    def break_even_epochs(self) -> float:
        """Epochs, of all students together, after which the cache has cost less; infinite where it never does."""
        saved_s = self.live_epoch_s - self.cached_epoch_s
        return self.capture_s / saved_s if saved_s > 0 else math.inf

    def to_json(self) -> dict[str, float | None]:
        """Plain JSON values: ``break_even_epochs`` is None where the cache never pays, as JSON has no infinity."""
        epochs = self.break_even_epochs
        return asdict(self) | {"break_even_epochs": epochs if math.isfinite(epochs) else None}

    def pays_after(self) -> str:
        """``pays after 1.23 epochs`` or ``never pays``."""
        epochs = self.break_even_epochs
        return f"pays after {epochs:.2f} epochs" if math.isfinite(epochs) else "never pays"

    def live_s(self, *, num_students: int, num_epochs: float) -> float:
        return num_students * num_epochs * self.live_epoch_s

    def cached_s(self, *, num_students: int, num_epochs: float) -> float:
        return self.capture_s + num_students * num_epochs * self.cached_epoch_s
