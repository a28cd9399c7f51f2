"""The tables of the documents, made from docs/measured: each stands there between two comments.

    <!-- measured: loss -->
    (the table of docs/measured/loss.json, its notes, and where its figures come from)
    <!-- end -->

``record`` takes what a benchmark has kept into docs/measured; ``write_pages`` makes the documents follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks import tables
from tests.benchmarks.tables import Table

DOCS = tables.ROOT / "docs"
BLOCK = re.compile(
    r"^<!-- measured: (\S+) -->\n(?:(?!<!-- measured:).)*?^<!-- end -->$", re.MULTILINE | re.DOTALL
)


def measured(name: str) -> Path:
    return DOCS / "measured" / f"{name}.json"


def documents() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


def names(text: str) -> list[str]:
    """Of the tables that a document shows."""
    return BLOCK.findall(text)


def filled(text: str) -> str:
    """The document with the tables as they are in docs/measured.

    Raises   ValueError  a comment has no end, or a table is not there
    """
    if text.count("<!-- measured: ") != len(names(text)):
        raise ValueError("a comment 'measured' has no comment 'end' behind it")
    return BLOCK.sub(lambda found: _block(found[1]), text)


def _block(name: str) -> str:
    path = measured(name)
    if not path.exists():
        raise ValueError(f"{path.name} is not in {path.parent.name}; record it, or take its comment out")
    table = Table.read(path)
    parts = ["\n".join(table.lines()), *([table.notes] if table.notes else []), f"*{table.source.line()}*"]
    return f"<!-- measured: {name} -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end -->"


def write_pages() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")


def record(benchmarks: Iterable[str]) -> list[str]:
    """Takes the tables that these have kept and that documents show into docs/measured; says what it does.

    Raises   ValueError  nothing is kept of one
    """
    shown = {name for path in documents() for name in names(path.read_text(encoding="utf-8"))}
    kept = {path.stem: Table.read(path) for path in sorted(tables.KEPT.glob("*.json"))}
    said = []
    for benchmark in benchmarks:
        own = {name: table for name, table in kept.items() if table.source.benchmark == benchmark}
        if not own:
            raise ValueError(f"nothing is kept of {benchmark!r}: run it first")
        for name, table in own.items():
            if name in shown:
                table.write(measured(name))
            place = "recorded" if name in shown else "left out, no document shows it"
            said.append(f"{name}: {place} ({table.source.line()})")
    return said
