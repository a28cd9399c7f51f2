"""Figures of one look; matplotlib, of the extra ``report``, is loaded when something is drawn.

    save_png(Drawing("Loss", lambda axes: axes.plot([1, 2, 3]), "Falls."), Path("curve.png"))

Series are told apart by their dashes and markers as well as by colour.  In a page's vector pictures ink and
grid follow the background, light or dark; the series' colours are readable on both.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import RecipeError
from shared.reports.text import label, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (5.2, 3.4)
DPI = 160
INK, LINE = "#1d2733", "#d9dee4"
DARK_INK, DARK_LINE = "#e4e8ec", "#39424c"
COLORS = ("#2f7fd8", "#d0702a", "#2b9a63", "#a760c9", "#c9485b", "#1a98a6", "#8f8428", "#7f8a96")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
_OUTLINES = {  # of the markers, about (20, 8), for a key
    "o": "M15 8a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "s": "M15 3h10v10h-10z",
    "^": "M20 2l6 11h-12z",
    "D": "M20 2l6 6l-6 6l-6 -6z",
    "v": "M20 14l6 -11h-12z",
    "P": "M18 3h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M16 3l4 3l4 -3l2 2l-4 3l4 3l-2 2l-4 -3l-4 3l-2 -2l4 -3l-4 -3z",
    "*": "M20 2l2 4l4 1l-3 3l1 4l-4 -2l-4 2l1 -4l-3 -3l4 -1z",
}
REFERENCE = "#7f8a96"  # what is no series: a diagonal, the teacher's level
LOG_FROM = 4.0  # largest over smallest value, from which on an axis is logarithmic

Draw = Callable[[Any], None]  # on matplotlib's axes


@dataclass(frozen=True)
class Drawing:
    """A figure.

    caption  what it shows, in plain words
    told     what it shows for who cannot see it; None: the caption has to do
    """

    title: str
    draw: Draw
    caption: str
    told: str | None = None


@dataclass(frozen=True)
class Series:
    """How one of several is drawn, the same in every figure."""

    number: int

    @property
    def color(self) -> str:
        return COLORS[self.number % len(COLORS)]

    @property
    def marker(self) -> str:
        return MARKERS[(self.number + self.number // len(COLORS)) % len(MARKERS)]

    @property
    def dashes(self) -> str:
        return DASHES[self.number // len(COLORS) % len(DASHES)]

    def points(self, name: str | None = None) -> dict[str, Any]:
        """Open markers, joined by a thin line: what lies below can be seen."""
        style = {"color": self.color, "marker": self.marker, "markerfacecolor": "none", "markersize": 5.5}
        return style | {
            "linewidth": 1.1,
            "linestyle": self.dashes,
            "label": None if name is None else label(name),
        }


def save_png(drawing: Drawing, path: Path) -> Path:
    """The drawing under its title, as a file; returns its path.

    Raises   RecipeError  when matplotlib is not installed
    """
    with _look():
        figure = _figure(drawing.draw)
        figure.axes[0].set_title(drawing.title)
        figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def svg(draw: Draw) -> bytes:
    """What ``draw`` draws, as a vector picture: the same drawing, the same bytes.

    Raises   RecipeError  when matplotlib is not installed
    """
    buffer = io.BytesIO()
    with _look():
        _figure(draw).savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue().decode()
    text = text.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    themes = (
        f":root{{--ink:{INK};--line:{LINE}}}"
        f"@media(prefers-color-scheme:dark){{:root{{--ink:{DARK_INK};--line:{DARK_LINE}}}}}"
    )
    return text.replace('<style type="text/css">', f'<style type="text/css">{themes}', 1).encode()


def swatch(series: Series) -> str:
    """A series' line and marker as HTML, for a key outside of the figures."""
    dashes = {"-": "", "--": "6 3", "-.": "6 2 1 2", ":": "1 2"}[series.dashes]
    return (
        f'<svg viewBox="0 0 40 16" aria-hidden="true" fill="none" stroke="{series.color}" stroke-width="2">'
        f'<path d="M0 8H40" stroke-dasharray="{dashes}"/><path d="{_OUTLINES[series.marker]}"/></svg>'
    )


def require_matplotlib() -> None:
    """Raises   RecipeError  when it is not installed"""
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("reports and plots need matplotlib. Run `pip install 'teachonce[report]'`")


def spans_much(values: Iterable[float]) -> bool:
    """Whether a linear axis would flatten most of these: all are positive, and the largest is far above the rest."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) / min(found) >= LOG_FROM


def set_log(axes: Any, which: str = "y") -> None:
    """Makes an axis logarithmic, with plain numbers: at 1, 2 and 5, or at all digits of a single decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=range(1, 10) if high < 10 * low else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def add_legend(axes: Any) -> None:
    """Where there is something to name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


@contextmanager
def _look() -> Iterator[None]:
    require_matplotlib()
    import matplotlib as mpl

    look: dict[Any, Any] = {
        "font.size": 10.5,
        "legend.fontsize": 9.5,
        "text.parse_math": False,  # names from data may hold dollar signs
        "svg.fonttype": "none",
        "svg.hashsalt": "teachonce",
        **dict.fromkeys(
            ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK
        ),
    }
    with mpl.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _figure(draw: Draw) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no global state, and no screen is looked for
    from matplotlib.text import Text

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    draw(axes)
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))
    return figure
