"""A report as one HTML file that needs nothing beside it: style, pictures and curves are inside.

    page = Page("cache medpix", [Section("Targets", [facts({"policy": "threshold"})])])
    write_page(page, Path("report.html"))

It can be read without scripts, by keyboard and by ear: headings, a list of sections, tables with heads.
What stands in a section comes from ``shared.reports.pieces``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.regular_files import write_output
from shared.reports.style import STYLE
from shared.reports.text import escape


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, as HTML."""

    title: str
    pieces: Sequence[str]


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[Section]
    lead: str = ""

    def html(self) -> str:
        title = escape(self.title)
        named = [(f"s{i}", escape(section.title)) for i, section in enumerate(self.sections)]
        links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in named)
        body = "".join(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{name}</h2>\n'
            + "\n".join(section.pieces)
            + "\n</section>\n"
            for (anchor, name), section in zip(named, self.sections, strict=True)
        )
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{title}</h1>
<p class="dim">{escape(self.lead)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main">
{body}</main>
</body>
</html>
"""


def write_page(page: Page, path: Path) -> None:
    """The page as a file, at once or not at all; a pipe or a device is written to."""
    write_output(path, page.html().encode())
