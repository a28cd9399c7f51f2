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
from tests.benchmarks.tables import FIGURES, NOT_REACHED, Table

DOCS = tables.ROOT / "docs"
BLOCK = re.compile(
    r"^<!-- measured: (\S+) -->\n(?:(?!<!-- measured:).)*?^<!-- end -->$", re.MULTILINE | re.DOTALL
)
BOLD = re.compile(r"\*\*.+?\*\*")


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


def lost(old: Table, new: Table) -> list[str]:
    """What the new table no longer has: parts, the goals of rows, and what was added to a figure in bold."""
    gone = [f"the part {key!r}" for key in old.parts if key not in new.parts]
    if tuple(old.head) != FIGURES:
        return gone
    goals = {name: goal for name, goal, _ in new.rows}
    gone += [f"the goal of {name!r}" for name, goal, _ in old.rows if goal != "-" == goals.get(name, "-")]
    text = " ".join(cell for row in new.rows for cell in row)
    caveats = [one for row in old.rows for one in BOLD.findall(row[2]) if one != NOT_REACHED]
    return gone + [f"the words {one!r}" for one in caveats if one not in text]


def record(benchmarks: Iterable[str]) -> list[str]:
    """Takes the tables that these have kept and that documents show into docs/measured; says what it does.

    Raises   ValueError  nothing is kept of one, or what docs/measured has would be lost: see ``lost``
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
                if measured(name).exists() and (gone := lost(Table.read(measured(name)), table)):
                    raise ValueError(
                        f"{name}: to record this would lose {'; '.join(gone)}. Measure with the settings of before; "
                        f"or remove docs/measured/{name}.json first, and what the pages say of it"
                    )
                table.write(measured(name))
            place = "recorded" if name in shown else "left out, no document shows it"
            said.append(f"{name}: {place} ({table.source.line()})")
    return said
