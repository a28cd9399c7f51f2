"""Figures of one look; matplotlib, of the extra ``report``, is loaded when something is drawn.

save_png(lambda axes: axes.plot([1, 2, 3]), Path("curve.png"))
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (6.4, 3.6)
DPI = 160

Draw = Callable[[Any], None]  # on matplotlib's axes


def save_png(draw: Draw, path: Path) -> Path:
    """What ``draw`` draws, as a file; returns its path.

    Raises   RecipeError  when matplotlib is not installed
    """
    _figure(draw).savefig(path, dpi=DPI)
    return path


def svg(draw: Draw) -> bytes:
    """What ``draw`` draws, as a vector picture: the same drawing, the same bytes.

    Raises   RecipeError  when matplotlib is not installed
    """
    figure = _figure(draw)
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "teachonce"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def require_matplotlib() -> None:
    """Raises   RecipeError  when it is not installed"""
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("reports and plots need matplotlib. Run `pip install 'teachonce[report]'`")


def _figure(draw: Draw) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no global state, and no screen is looked for

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    draw(axes)
    return figure
