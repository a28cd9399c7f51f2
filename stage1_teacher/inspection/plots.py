"""Pictures of what a cache holds: ``teacher-cache inspect CACHE --plots FOLDER``.  Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache import CacheReader
from shared.cache.inspect import Sample, sample_rows
from shared.errors import CacheFormatError
from shared.reports.figures import COLORS, Drawing, add_legend, require_matplotlib, save_png
from shared.reports.reliability import Reliability, draw_reliability
from shared.reports.text import label
from stage1_teacher.inspection.pictures import gain_drawing
from stage1_teacher.inspection.positions import Positions, positions_of

BLUE, ORANGE = COLORS[:2]
ENTROPY, CE = "teacher's entropy", "cross-entropy with the answer"
ENOUGH = 10  # positions at a place of the answer, from which on their mean is drawn
MAX_KINDS = 12


def plot_cache(reader: CacheReader, folder: Path) -> list[Path]:
    """Writes the pictures into ``folder``, from a sample of rows; returns their paths.

    Raises   RecipeError       when matplotlib is not installed
             CacheFormatError  when the cache has no positions
    """
    require_matplotlib()
    if not reader.manifest.totals.positions:
        raise CacheFormatError(f"cache {reader.location}: it has no positions, there is nothing to draw")
    sample = sample_rows(reader)
    folder.mkdir(parents=True, exist_ok=True)
    return [save_png(drawing, folder / f"{name}.png") for name, drawing in drawings(sample).items()]


def drawings(sample: Sample) -> dict[str, Drawing]:
    """By the names of their files."""
    found = {
        "certainty": _drawing(
            "How sure the teacher is",
            _certainty,
            sample,
            "Each example's mean over its answer. Low entropy: the teacher is sure. Low cross-entropy: what it "
            "expects is the answer.",
        ),
        "entries": _drawing(
            "Entries per position",
            _entries,
            sample,
            "How many tokens were kept at a position, on a logarithmic axis. Uncertain positions keep more.",
        ),
        "bytes": _drawing(
            "Bytes per position",
            _bytes,
            sample,
            "Each dot is an example. The less sure the teacher, the more bytes its targets take.",
        ),
        "kept_mass": _drawing(
            "Kept mass",
            _kept_mass,
            sample,
            "The sum of a position's weights. Of a sampled policy it is one on average; of a cut one it is the "
            "probability that was kept.",
        ),
    }
    positions = positions_of(sample.rows, sample.targets)
    if positions is not None:
        found |= {"by_place": by_place(positions), "calibration": calibration(positions)}
    if sample.rows[0].label_gain is not None:
        found["visual_gain"] = gain_drawing(sample.rows)
    return found


def by_place(positions: Positions) -> Drawing:
    """Entropy and cross-entropy over the places of an answer."""
    counts = np.bincount(positions.place_N)
    places = np.flatnonzero(counts >= min(ENOUGH, counts.max()))
    means = {
        name: np.bincount(positions.place_N, values_N)[places] / counts[places]
        for name, values_N in ((ENTROPY, positions.entropy_N), (CE, positions.ce_N))
    }
    told = "; ".join(
        f"{name} {values[0]:.2f} at the first token, {values[-1]:.2f} at token {places[-1] + 1}"
        for name, values in means.items()
    )

    def draw(axes: Any) -> None:
        for (name, values), color, marker in zip(means.items(), (BLUE, ORANGE), "os", strict=True):
            axes.plot(
                places + 1, values, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=name
            )
        axes.set(xlabel="token of the answer", ylabel="nats per position")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        add_legend(axes)

    caption = (
        "Means over all sampled answers that are long enough. Where the lines lie together, the teacher is as "
        f"sure as it should be. Places with fewer than {ENOUGH} answers are left out."
    )
    return Drawing("By position in the answer", draw, caption, told)


def by_kind(kinds: Sequence[str], positions: Positions) -> Drawing:
    """Entropy and cross-entropy of each kind of question.

    kinds  (R,) of the rows
    """
    names, kind_R = np.unique(np.array(kinds, dtype=object).astype(str), return_inverse=True)
    kind_N = kind_R[positions.row_N]
    counts = np.bincount(kind_N, minlength=len(names))
    chosen = np.argsort(-counts, kind="stable")[:MAX_KINDS]
    means = [
        np.bincount(kind_N, values_N, len(names))[chosen] / counts[chosen]
        for values_N in (positions.entropy_N, positions.ce_N)
    ]
    labels = [label(names[one]) for one in chosen]
    told = "; ".join(
        f"{name}: entropy {entropy:.2f}, cross-entropy {ce:.2f}"
        for name, entropy, ce in zip(labels, *means, strict=True)
    )

    def draw(axes: Any) -> None:
        height = 0.36
        rows = np.arange(len(labels))
        axes.barh(rows - height / 2, means[0], height, color=BLUE, label=ENTROPY)
        axes.barh(
            rows + height / 2, means[1], height, facecolor="none", edgecolor=ORANGE, hatch="///", label=CE
        )
        axes.set_yticks(rows, labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="nats per position")
        axes.figure.legend(loc="outside upper left", frameon=False, ncols=2)

    caption = "Means over the positions of the examples looked at. Long bars: questions that the teacher finds hard."
    return Drawing("By kind of question", draw, caption, told)


def calibration(positions: Positions) -> Drawing:
    found = Reliability.of(positions.top_prob_N, positions.is_label_N)
    return draw_reliability({"teacher": (found, None)})


def _drawing(title: str, draw: Callable[..., None], sample: Sample, caption: str) -> Drawing:
    return Drawing(title, partial(draw, sample=sample), caption)


def _shares(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Weights that make a histogram one of per cents."""
    return np.full(len(values), 100 / len(values))


def _entries(axes: Any, sample: Sample) -> None:
    """How uneven the cost is over positions."""
    counts_N = sample.counts_N
    edges = np.unique(np.geomspace(1, max(2, counts_N.max() + 1), 40).round()) - 0.5
    axes.hist(counts_N, bins=edges, color=BLUE, weights=_shares(counts_N))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(counts_N.mean(), color=ORANGE, linestyle="--", label=f"mean {counts_N.mean():.1f}")
    axes.set(xlabel="entries kept", ylabel=f"% of {len(counts_N):,} positions")
    add_legend(axes)


def _certainty(axes: Any, sample: Sample) -> None:
    """The teacher's entropy, and how well it knows the answers."""
    (temperature, entropy_R), *_ = sample.entropy_R.items()
    edges = np.linspace(0, max(float(np.max([*entropy_R, *sample.ce_R])), 1e-3), 40)
    each = _shares(entropy_R)
    axes.hist(entropy_R, bins=edges, weights=each, color=BLUE, label=f"{ENTROPY}, T = {temperature:g}")
    axes.hist(sample.ce_R, bins=edges, weights=each, histtype="step", color=ORANGE, linewidth=1.5, label=CE)
    axes.set(xlabel="nats per position", ylabel=f"% of {len(entropy_R):,} examples")
    add_legend(axes)


def _bytes(axes: Any, sample: Sample) -> None:
    """What an example costs, against how unsure the teacher was."""
    entropy_R = next(iter(sample.entropy_R.values()))
    axes.scatter(entropy_R, sample.payload_R, s=9, color=BLUE, alpha=0.5, linewidths=0, rasterized=True)
    mean = float(np.average(sample.payload_R, weights=sample.positions_R))
    axes.axhline(mean, color=ORANGE, linestyle="--", label=f"mean {mean:.1f}")
    axes.set(xlabel="teacher's entropy (nats per position)", ylabel="payload (bytes per position)")
    axes.set_ylim(bottom=0)
    add_legend(axes)


def _kept_mass(axes: Any, sample: Sample) -> None:
    """Sums of weights at each captured temperature."""
    most = max(float(mass_N.max()) for mass_N in sample.kept_mass_N.values())
    least = min(float(mass_N.min()) for mass_N in sample.kept_mass_N.values())
    edges = np.linspace(least - 1e-3, most + 1e-3, 40)
    for number, (temperature, mass_N) in enumerate(sample.kept_mass_N.items()):
        style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[number % 4]}
        axes.hist(
            mass_N,
            bins=edges,
            weights=_shares(mass_N),
            histtype="step",
            label=f"T = {temperature:g}",
            **style,
        )
    axes.set(xlabel="sum of a position's weights", ylabel="% of positions")
    add_legend(axes)
