"""Channels of more than 8 bits: how all of their bits are read, and how they become 8."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile

MAX_OUTLIERS = 1 / 1000  # of the pixels
ORIENTATION = 0x0112  # of EXIF

# Pillow keeps the upper byte of 16-bit colour.  Read with the other byte order, the same file gives the lower one.
_OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB")
}
_GREY_AND_ALPHA_16 = "LA;16B"  # four bytes a pixel, which "RGBA" reads one by one


def low_bytes(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile]) -> np.ndarray | None:
    """The lower bytes of 16-bit colour or of grey with alpha, as Pillow's mode has the upper ones; else None."""
    raw_modes = {_raw_mode(tile.args) for tile in image.tile}
    raw = raw_modes.pop() if len(raw_modes) == 1 else ""
    native = {"little": "16L", "big": "16B"}[sys.byteorder]
    other = "RGBA" if raw == _GREY_AND_ALPHA_16 else _OTHER_BYTES.get(raw.replace("16N", native))
    if other is None:
        return None
    with reopen() as again:
        again.tile = [
            tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
            for tile in again.tile
        ]
        again.load()
        found = np.asarray(again)
    return found[..., [1, 1, 1, 3]] if raw == _GREY_AND_ALPHA_16 else found


def _raw_mode(arguments: Any) -> str:
    """How a decoder's pixels lie in the file, of the arguments that Pillow gives it."""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def scaled_colour(image: Image.Image, low: np.ndarray) -> Image.Image:
    """16-bit colour, its channels stretched together over their own range; alpha keeps its upper byte."""
    values = np.asarray(image).astype(np.float64) * 256 + low
    colour, see_through = stretched(values[..., :3]), image.info.get("transparency")
    if image.mode == "RGBA":
        alpha = np.asarray(image)[..., 3]
    else:  # PNG may name one colour, in 16 bits
        hidden = (values == see_through).all(-1) if isinstance(see_through, tuple) else False
        alpha = np.where(hidden, 0, np.full(values.shape[:2], 255)).astype(np.uint8)
    scaled = Image.fromarray(np.dstack([colour, alpha]), "RGBA")
    scaled.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return scaled


def stretched(values: np.ndarray) -> np.ndarray:
    """Values of any kind as 0 to 255, linear between the ends of their range; uint8 of the same shape."""
    low, high = _range_of(values[np.isfinite(values)])
    level = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    spread = high - low
    stretched = np.rint((level - low) * (255.0 / spread)) if spread > 0 else np.zeros_like(level)
    return stretched.astype(np.uint8)


def _range_of(finite: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value, without dead and hot pixels; (0, 0) of no values.

    An end is left out for the value a thousandth further in, where it lies further from that than the values
    between are wide.
    """
    if not finite.size:
        return 0.0, 0.0
    num_outliers = int(finite.size * MAX_OUTLIERS)
    low, high = float(finite.min()), float(finite.max())
    if not num_outliers:
        return low, high
    inner = np.partition(finite, [num_outliers, finite.size - 1 - num_outliers])
    inner_low, inner_high = float(inner[num_outliers]), float(inner[-1 - num_outliers])
    width = inner_high - inner_low
    if width <= 0:
        return low, high
    return (
        inner_low if inner_low - low > width else low,
        inner_high if high - inner_high > width else high,
    )
