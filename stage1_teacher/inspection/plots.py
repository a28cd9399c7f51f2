"""Pictures of what a cache holds: ``teacher-cache inspect CACHE --plots FOLDER``.  Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import CacheReader
from shared.cache.inspect import Sample, sample_rows
from shared.errors import CacheFormatError
from shared.reports.figures import require_matplotlib, save_png

BLUE, ORANGE = "#33628f", "#d17a22"


def plot_cache(reader: CacheReader, folder: Path) -> list[Path]:
    """Writes the pictures into ``folder``, from a sample of rows; returns their paths.

    Raises   RecipeError       when matplotlib is not installed
             CacheFormatError  when the cache is empty
    """
    require_matplotlib()
    if not len(reader):
        raise CacheFormatError(f"cache {reader.location}: it is empty, there is nothing to draw")
    sample = sample_rows(reader)
    folder.mkdir(parents=True, exist_ok=True)
    return [save_png(partial(draw, sample=sample), folder / f"{name}.png") for name, draw in DRAWINGS.items()]


def _entries(axes: Any, sample: Sample) -> None:
    """Entries a position: how uneven the cost is over positions."""
    counts_N = sample.counts_N
    edges = np.unique(np.geomspace(1, max(2, counts_N.max() + 1), 40).round()) - 0.5
    axes.hist(counts_N, bins=edges, color=BLUE, weights=np.full(len(counts_N), 100 / len(counts_N)))
    axes.set_xscale("log")
    axes.axvline(counts_N.mean(), color=ORANGE, label=f"mean {counts_N.mean():.1f}")
    axes.set(
        title="Entries a position",
        xlabel="entries kept (ids)",
        ylabel=f"share of {len(counts_N):,} positions (%)",
    )
    axes.legend(frameon=False)


def _certainty(axes: Any, sample: Sample) -> None:
    """The teacher's entropy, and how well it knows the answers."""
    (temperature, entropy_R), *_ = sample.entropy_R.items()
    edges = np.linspace(0, max(float(np.max([*entropy_R, *sample.ce_R])), 1e-3), 40)
    each = np.full(len(entropy_R), 100 / len(entropy_R))
    axes.hist(entropy_R, bins=edges, weights=each, color=BLUE, label=f"entropy at T = {temperature:g}")
    axes.hist(
        sample.ce_R,
        bins=edges,
        weights=each,
        histtype="step",
        color=ORANGE,
        label="cross-entropy with the answer",
    )
    axes.set(
        title="The teacher, an example's mean",
        xlabel="nats a position",
        ylabel=f"share of {len(entropy_R):,} examples (%)",
    )
    axes.legend(frameon=False)


def _bytes(axes: Any, sample: Sample) -> None:
    """What an example costs, against how unsure the teacher was."""
    entropy_R = next(iter(sample.entropy_R.values()))
    axes.scatter(entropy_R, sample.payload_R, s=8, color=BLUE, alpha=0.5, linewidths=0)
    mean = float(np.average(sample.payload_R, weights=sample.positions_R))
    axes.axhline(mean, color=ORANGE, label=f"mean {mean:.1f}")
    axes.set(
        title="Payload of an example", xlabel="teacher's entropy (nats a position)", ylabel="bytes a position"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_kept_mass(axes: Any, sample: Sample) -> None:
    """Sums of weights at each captured temperature."""
    most = max(float(mass_N.max()) for mass_N in sample.kept_mass_N.values())
    least = min(float(mass_N.min()) for mass_N in sample.kept_mass_N.values())
    edges = np.linspace(least - 1e-3, most + 1e-3, 40)
    for temperature, mass_N in sample.kept_mass_N.items():
        each = np.full(len(mass_N), 100 / len(mass_N))
        axes.hist(mass_N, bins=edges, weights=each, histtype="step", label=f"T = {temperature:g}")
    axes.set(title="Kept mass", xlabel="sum of a position's weights", ylabel="share of positions (%)")
    axes.legend(frameon=False)


DRAWINGS: dict[str, Callable[..., None]] = {
    "entries": _entries,
    "certainty": _certainty,
    "bytes": _bytes,
}
