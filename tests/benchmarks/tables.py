"""Tables of what benchmarks measure: printed as Markdown, and kept as JSON with where their figures come from.

    bench = Bench("loss")
    bench.show("loss", "Time and memory of the loss", FIGURES, [figure("time", 1.02, most=1.05)])

A table has a file of its own in work/benchmarks/tables, which the next one of that name replaces.  Those in the
documents lie in docs/measured: see ``tests.benchmarks.pages``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "work" / "benchmarks" / "tables"
FIGURES = ("figure", "to reach", "measured")
NOT_REACHED = "**not reached**"


@dataclass(frozen=True)
class Source:
    """Where figures come from; None where nobody knows.

    benchmark  that writes this table; None: no benchmark does
    date       YYYY-MM-DD, or that "or before"; of figures of several days "... to ..."
    commit     of figures of several commits all of them, apart by spaces
    is_clean   whether all files but those of docs/ were those of the commit
    goes_on    some of it had been measured before, perhaps by earlier commits
    """

    benchmark: str | None = None
    date: str | None = None
    commit: str | None = None
    is_clean: bool | None = None
    goes_on: bool = False
    command: str | None = None
    versions: dict[str, str] | None = None
    num_cores: int | None = None
    seconds: float | None = None

    @classmethod
    def here(cls, benchmark: str, *, goes_on: bool) -> Source:
        """Of a benchmark that begins now, in this process."""
        return cls(
            benchmark=benchmark,
            date=time.strftime("%Y-%m-%d"),
            commit=commit(),
            is_clean=_git("status", "--porcelain", "--", ":!docs") == "",
            goes_on=goes_on,
            command=_command(benchmark),
            versions={"Python": platform.python_version()} | versions(("torch", "transformers")),
            num_cores=os.cpu_count(),
        )

    def of(self, stamps: Iterable[Mapping[str, Any]]) -> Source:
        """That of figures which were kept, each with its ``stamp``; this one where there are none."""
        ordered = sorted(stamps, key=lambda one: one["date"])
        if not ordered:
            return self
        first, last = ordered[0]["date"], ordered[-1]["date"]
        commits = list(dict.fromkeys(one["commit"] for one in ordered if one.get("commit")))
        return replace(
            self,
            date=first if first == last else f"{first} to {last}",
            commit=" ".join(commits) or None,
            is_clean=self.is_clean if commits == [self.commit] else None,
            goes_on=any(one.get("goes_on") for one in ordered),
        )

    def line(self) -> str:
        """One sentence."""
        state = " with changes" if self.is_clean is False else ""
        state += " and those before it" if self.goes_on else ""
        parts = [
            f"Measured {self.date or 'on an unknown day'}",
            f"commit {', '.join(one[:7] for one in self.commit.split())}{state}"
            if self.commit
            else "commit unknown",
            f"`{self.command}`" if self.command else "command unknown",
        ]
        parts += [f"{self.seconds:,.0f} s"] if self.seconds is not None else []
        parts += [f"{self.num_cores} cores"] if self.num_cores is not None else []
        parts += [f"{name} {version}" for name, version in (self.versions or {}).items()]
        return ", ".join(parts) + "."


@dataclass(frozen=True)
class Table:
    """Cells are Markdown.

    title  what was measured, for who sees the table alone
    notes  the settings, and what the figures mean where the head does not say it
    parts  what was measured one by one, of a benchmark of many hours: a later one, elsewhere, goes on with it
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str
    source: Source
    parts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [f"| {' | '.join(self.head)} |", "|---" * len(self.head) + "|"] + [
            f"| {' | '.join(row)} |" for row in self.rows
        ]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Table:
        tree = json.loads(path.read_text())
        return cls(**tree | {"source": Source(**tree["source"])})


class Bench:
    """A benchmark at work, which shows its tables; ``goes_on`` with what it kept when it ran before."""

    def __init__(self, name: str, *, goes_on: bool = False) -> None:
        self.source = Source.here(name, goes_on=goes_on)
        self.begin = time.monotonic()

    def show(
        self,
        name: str,
        title: str,
        head: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        notes: str = "",
        parts: Mapping[str, Any] | None = None,
        stamps: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Prints a table, and keeps it in place of the last one of that name; not one without rows.

        stamps  of figures that were kept: the table's days and commits are theirs
        """
        if not (rows := [list(row) for row in rows]):
            return
        seconds = (
            None if self.source.goes_on else round(time.monotonic() - self.begin, 1)
        )  # not of what was kept
        source = replace(self.source.of(stamps), seconds=seconds)
        table = Table(title, list(head), rows, notes, source, dict(parts or {}))
        table.write(KEPT / f"{name}.json")
        parts = [title, "\n".join(table.lines()), *([notes] if notes else [])]
        print("\n" + "\n\n".join(parts), flush=True)


def figure(
    name: str,
    value: float,
    form: str = ".3f",
    *,
    unit: str = "",
    more: str = "",
    most: float | None = None,
    least: float | None = None,
) -> tuple[str, str, str]:
    """A row under ``FIGURES``, which says when a goal is missed; ``more`` stands behind the figure."""
    goal = most if least is None else least
    missed = (most is not None and not value <= most) or (least is not None and not value >= least)
    measured = f"{value:{form}}{unit}{more}" + (f": {NOT_REACHED}" if missed else "")
    return name, "-" if goal is None else f"{goal:,g}{unit}", measured


def stamp() -> dict[str, Any]:
    """Day and commit of a figure that is measured now."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit()}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    return _git("rev-parse", "HEAD") or None


def changes() -> str | None:
    """A name for what differs from the commit, but for docs/; None where nothing does, or nobody knows."""
    found = _git("diff", "HEAD", "--", ":!docs")
    return hashlib.sha256(found.encode()).hexdigest()[:12] if found else None


def _git(*arguments: str) -> str | None:
    """What it says; None where there is no repository, or no git."""
    try:
        ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _command(benchmark: str) -> str:
    """That repeats this one, without the folders of this machine."""
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"tests.benchmarks.bench_{benchmark}", *words])
