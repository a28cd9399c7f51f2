"""What runs of students have measured: one JSON line a run, and the tables made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.tables import stamp

FOLDER = Path("work/benchmarks")
RESULTS = FOLDER / "students.jsonl"
LENGTHS: dict[str, dict[str, int | None]] = {
    "1 epoch": {"num_epochs": 1, "limit": None},
    "20 epochs": {"num_epochs": 20, "limit": 240},
}
TIMED = "1 epoch, timed"
LABELS, LIVE = "labels alone", "teacher live"
COSTS = ["taught by", "step", *(f"memory, {one}" for one in LENGTHS)]


def learned(lengths: Iterable[str] = LENGTHS) -> list[str]:
    """The head of ``Results.table``."""
    return [
        "taught by",
        "bytes",
        *(name for one in lengths for name in (f"KL, {one}", "/ live", "CE", "right")),
    ]


def done(results: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was measured, by key; in RESULTS if no other file is given."""
    return {json.dumps(record["key"]): record for record in read_lines(results or RESULTS)}


def keep(key: list[Any], found: dict[str, Any], results: Path | None = None, *, fingerprint: str) -> None:
    """``fingerprint``: of the recipe that it was measured with."""
    append_line(results or RESULTS, {"key": key, "fingerprint": fingerprint} | stamp() | found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON, one record a line; a last line without its end was cut off as it was written, and does not count."""
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """In the place of a last line that was cut off."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(record) + "\n").encode())


def mean(values: list[float], form: str) -> str:
    """Over seeds, and half their range in brackets; of one seed the value alone."""
    if not values:
        return "-"
    around = f" ({(max(values) - min(values)) / 2:{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{around}"


class Results:
    """What has been measured of a recipe at a ``kd_ratio``, and of labels alone; of runs with that ``held_out``.

    fingerprint  of the recipe as it is now: what was measured with others is left out
    """

    def __init__(
        self,
        name: str,
        kd_ratio: float,
        results: Path | None = None,
        *,
        fingerprint: str,
        held_out: int | None = None,
    ) -> None:
        self.name, self.kd_ratio = name, kd_ratio
        rows = [] if held_out is None else [held_out]
        kept = [
            record
            for record in done(results).values()
            if record.get("fingerprint") == fingerprint
            and record["key"][0] == name
            and record["key"][4] in (0.0, kd_ratio)
            and record["key"][5:] == rows
        ]
        self.records = sorted(kept, key=lambda record: record["key"][3])
        found = (r["key"][1] for r in self.records if r["key"][2] in LENGTHS)
        self.variants = sorted(dict.fromkeys(found), key=self._place)

    @property
    def stamps(self) -> list[dict[str, Any]]:
        """Days and commits of what was measured."""
        return [{name: record.get(name) for name in ("date", "commit")} for record in self.records]

    def values(self, variant: str, length: str, field: str) -> dict[int, Any]:
        """By seed."""
        found = {r["key"][3]: r.get(field) for r in self.records if r["key"][1:3] == [variant, length]}
        return {seed: value for seed, value in found.items() if value is not None}

    def ratio(self, variant: str, length: str, field: str, reference: str) -> list[float]:
        """Of runs of the same seed."""
        ones, others = (self.values(label, length, field) for label in (variant, reference))
        return [one / others[seed] for seed, one in ones.items() if seed in others]

    def step(self, variant: str) -> str:
        """A step's time against labels alone: the median over steps, and its quartiles in brackets."""
        found = self.values(variant, TIMED, "step")
        quartiles = self.values(variant, TIMED, "step_quartiles")
        if not found:
            return "-"
        ends = [statistics.fmean(column) for column in zip(*quartiles.values(), strict=True)]
        scatter = f" ({ends[0]:.3f} to {ends[1]:.3f})" if quartiles.keys() == found.keys() else ""
        return f"{statistics.fmean(found.values()):.3f}{scatter}"

    def size(self, variant: str) -> float:
        found = [
            value
            for length in LENGTHS
            for value in self.values(variant, length, "bytes_per_position").values()
        ]
        return statistics.fmean(found) if found else 0.0

    def notes(self, at_most: dict[str, str]) -> str:
        """Of a table; it names those that are larger than the one whose bytes they should have at most.

        Sizes were chosen by a sample.
        """
        larger = []
        for variant in self.variants:
            other = at_most.get(variant.split(",")[0], variant)
            size, its_size = self.size(variant), self.size(other)
            if size > its_size > 0:
                larger.append(f"{variant} ({size:.1f} bytes, {other} has {its_size:.1f})")
        seeds = {record["key"][3] for record in self.records}
        notes = "Means over seeds, half their range in brackets." if len(seeds) > 1 else "One seed."
        return notes + (f" Larger than what they are compared with: {', '.join(larger)}." if larger else "")

    def _place(self, variant: str) -> tuple[int, float]:
        kinds = (LABELS, LIVE, "tau", "top", "random")
        kind = next((i for i, kind in enumerate(kinds) if variant.startswith(kind)), len(kinds))
        return kind, -self.size(variant)

    def table(self, lengths: Sequence[str] = tuple(LENGTHS)) -> list[list[str]]:
        """Under ``learned(lengths)``: what the students learned."""
        lines = []
        for variant in self.variants:
            cells = [variant, f"{self.size(variant):.0f}" if self.size(variant) else "-"]
            for length in lengths:
                of_seed = {
                    name: [*self.values(variant, length, name).values()] for name in ("kl", "ce", "accuracy")
                }
                cells += [
                    mean(of_seed["kl"], ".3f"),
                    mean(self.ratio(variant, length, "kl", LIVE), ".3f") if variant != LIVE else "1",
                    mean(of_seed["ce"], ".3f"),
                    f"{100 * statistics.fmean(of_seed['accuracy']):.1f} %" if of_seed["accuracy"] else "-",
                ]
            lines.append(cells)
        return lines

    def costs(self) -> list[list[str]]:
        """Under ``COSTS``: what a step took, against labels alone."""
        lines = []
        for variant in self.variants:
            memory = [mean(self.ratio(variant, one, "peak_bytes", LABELS), ".3f") for one in LENGTHS]
            lines.append([variant, self.step(variant), *memory])
        return lines
