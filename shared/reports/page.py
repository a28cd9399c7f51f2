"""A report as one HTML file that needs nothing beside it: style, pictures and curves are inside.

    page = Page("cache medpix", [Section("Targets", [facts({"policy": "threshold"}), figure(draw, "Entries")])])
    write_page(page, Path("report.html"))

Pieces are HTML strings; everything that comes from data is escaped here.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.images import Background, decode_rgb
from shared.reports.figures import Draw, svg

THUMBNAIL = 320  # pixels of a picture's longer side
STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --line: #d9dee4; --soft: #f4f6f8;
        --accent: #33628f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14181d; --line: #333b44; --soft: #1d232a; --accent: #8db8e2 }
  figure img.drawn { background: #ffffff; border-radius: 4px }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .8rem; color: var(--accent) }
p { margin: .4rem 0; max-width: 46rem }
.grid, .figures { display: grid; gap: 1.2rem; align-items: start }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
         margin-top: 1rem }
.card { background: var(--soft); border-radius: 8px; padding: .8rem; overflow-wrap: anywhere }
.card img { display: block; width: 100%; height: 11rem; object-fit: contain; background: #000; border-radius: 4px;
            margin-bottom: .6rem }
.card dl { margin: 0 } .card dt { font-size: .8rem; opacity: .7 } .card dd { margin: 0 0 .4rem }
figure { margin: 0 } figure img { width: 100%; height: auto } figcaption { font-size: .9rem; opacity: .8 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { overflow-wrap: anywhere } .wide td { overflow-wrap: normal; white-space: nowrap }
"""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    pieces: Sequence[str]


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[Section]
    lead: str = ""

    def html(self) -> str:
        body = [f"<h1>{html.escape(self.title)}</h1>"]
        body += [paragraph(self.lead)] if self.lead else []
        for section in self.sections:
            body += [f"<h2>{html.escape(section.title)}</h2>", *section.pieces]
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(body)
            + "\n</body>\n</html>\n"
        )


def write_page(page: Page, path: Path) -> None:
    """The page as a file, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page.html(), encoding="utf-8")
    os.replace(partial, path)


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one line each."""
    rows = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(v))}</td></tr>" for name, v in values.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """May be wider than the page: it scrolls by itself."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table><tr>{cells}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def grid(pieces: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(pieces)}</div>'


def figures(pieces: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(pieces)}</div>'


def cards(pieces: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(pieces)}</div>'


def card(image: bytes, values: Mapping[str, str], *, background: Background = "black") -> str:
    """A picture, as a file's bytes, over names and values; an empty one is said to be empty.

    background  what the recipe lays behind transparency
    """
    terms = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value) or '<i>(empty)</i>'}</dd>"
        for name, value in values.items()
    )
    return f'<div class="card"><img alt="" src="{thumbnail(image, background)}"><dl>{terms}</dl></div>'


def thumbnail(image: bytes, background: Background) -> str:
    """The picture as the model sees it, but small; a data URL.

    Raises   DataError  when it cannot be decoded
    """
    picture = decode_rgb(image, background=background)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure(draw: Draw, caption: str) -> str:
    """What ``draw`` draws on matplotlib's axes, as a vector picture.

    Raises   RecipeError  when matplotlib is not installed
    """
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg(draw)).decode()}"
    text = html.escape(caption)
    return f'<figure><img class="drawn" alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
