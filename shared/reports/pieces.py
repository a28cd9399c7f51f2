"""What stands on a page: paragraphs, tables, figures, cards with a picture, parts that unfold.

    [paragraph("Of 12 rows."), table(["run", "CE"], [["soft", "0.61"]], caption="Results"), figure(drawing)]

Pieces are HTML strings; everything that comes from data is escaped here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.data.images import Background, decode_rgb
from shared.reports.figures import Drawing, Series, svg, swatch
from shared.reports.text import escape

THUMBNAIL = 320  # pixels of a picture's longer side
LONG = 600  # characters of a text that is folded
SHOWN = 300  # characters of it that are not


@dataclass(frozen=True)
class Judged:
    """An answer, and whether it is right; None where that is not a question of yes or no."""

    text: str
    is_right: bool | None
    note: str = ""


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one line each."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """The first cell of a row names it.  May be wider than the page: it scrolls by itself, by keyboard too."""
    return html_table(head, [[escape(cell) for cell in row] for row in rows], caption=caption)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """As ``table``, of cells that are HTML already."""
    name = escape(caption)
    cells = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}"><table>'
        f"<caption><span>{name}</span></caption><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def grid(pieces: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(f"<div>{piece}</div>" for piece in pieces)}</div>'


def beside(card: str, piece: str) -> str:
    """A card, and what is wider than it."""
    return f'<div class="beside">{card}<div>{piece}</div></div>'


def figures(pieces: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(pieces)}</div>'


def cards(pieces: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(pieces)}</div>'


def key(names: Sequence[str]) -> str:
    """Which line is whose, for figures that draw the series of these names in this order."""
    items = "".join(f"<li>{swatch(Series(i))}{escape(name)}</li>" for i, name in enumerate(names))
    return f'<ul class="key" aria-label="Key to the figures">{items}</ul>'


def folded(summary: str, pieces: Sequence[str]) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(pieces)}</details>"


def preformatted(text: str) -> str:
    return f'<pre tabindex="0">{escape(text)}</pre>'


def card(
    images: Sequence[bytes],
    values: Mapping[str, str | Judged],
    *,
    background: Background = "black",
    alt: str,
) -> str:
    """Pictures, as files' bytes, over names and values; an empty one is said to be empty.

    background  what the recipe lays behind transparency
    Raises      DataError  when a picture cannot be decoded
    """
    terms = "".join(
        f'<dt>{escape(name)}</dt><dd dir="auto">{_value(value)}</dd>' for name, value in values.items()
    )
    shown = "".join(
        picture(image, background=background, alt=alt if len(images) == 1 else f"Picture {number}. {alt}")
        for number, image in enumerate(images, start=1)
    )
    return f'<div class="card">{shown}<dl>{terms}</dl></div>'


def picture(image: bytes, *, background: Background, alt: str) -> str:
    """As the model sees it, but small.

    Raises   DataError  when it cannot be decoded
    """
    return f'<img alt="{escape(alt)}" src="{_thumbnail(image, background)}">'


def figure(drawing: Drawing) -> str:
    """A vector picture under its title and over its caption.

    Raises   RecipeError  when matplotlib is not installed
    """
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg(drawing.draw)).decode()}"
    title, caption = escape(drawing.title), escape(drawing.caption)
    alt = escape(f"{drawing.title}. {drawing.told or drawing.caption}")
    return (
        f'<figure><h3>{title}</h3><img alt="{alt}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    )


def _value(value: str | Judged) -> str:
    if isinstance(value, str):
        return _text(value)
    note = f' <span class="dim">{escape(value.note)}</span>' if value.note else ""
    if value.is_right is None:
        return _text(value.text) + note
    name, mark = ("right", "&#10003;") if value.is_right else ("wrong", "&#10007;")
    return f'<span class="{name}">{mark} {name}</span>: {_text(value.text)}{note}'


def _text(text: str) -> str:
    if not text:
        return "<i>(empty)</i>"
    if len(text) <= LONG:
        return f"<bdi>{escape(text)}</bdi>"
    return (
        f"<details><summary><bdi>{escape(text[:SHOWN])}</bdi>... (all {len(text):,} characters)</summary>"
        f"<bdi>{escape(text[SHOWN:])}</bdi></details>"
    )


def _thumbnail(image: bytes, background: Background) -> str:
    """A data URL."""
    small = decode_rgb(image, background=background)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
