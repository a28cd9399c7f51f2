"""Channels of more than 8 bits: how all of their bits are read, and how they become 8."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile

_Reader = Callable[[Image.Image, ImageFile.ImageFile], np.ndarray]

MAX_OUTLIERS = 1 / 1000  # of the pixels
ORIENTATION = 0x0112  # of EXIF

# Pillow keeps the upper byte of 16-bit colour.  Read with the other byte order, the same file gives the lower one.
_OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in ("BL", "LB")
}
_GREY_AND_ALPHA_16 = "LA;16B"  # four bytes a pixel, which "RGBA" reads one by one
_OTHER_BYTES |= {_GREY_AND_ALPHA_16: "RGBA", "L;16B": "L;16"}
_PPM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")


def all_bits(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile]) -> np.ndarray | None:
    """Values (height, width, channels) of a picture with 16 bits a channel, of which Pillow gives 8; else None.

    The picture is loaded.  Formats whose decoders give 8 bits alone are none of these: colour of JPEG 2000 and AVIF,
    and CMYK and premultiplied alpha of TIFF.
    """
    values_of = _reader(image)
    image.load()
    if values_of is None:
        return None
    with reopen() as again:
        return values_of(image, again)


def _reader(image: ImageFile.ImageFile) -> _Reader | None:
    """What makes these values of the loaded picture, and of the same one not loaded; by how its pixels lie."""
    for tile in image.tile[:1]:
        match tile.codec_name, tile.args:
            case "SGI16", _:
                return _values_of_sgi
            case "ppm", ("RGB", int(most)) if most > 255:
                return _values_of_ppm
            case "ppm_plain", ("RGB", int(most)) if most > 255:
                return _values_of_plain_ppm
    raw_modes = {_raw_mode(tile.args) for tile in image.tile}
    return _values_of_bytes if len(raw_modes) == 1 and raw_modes <= _OTHER_BYTES.keys() else None


def _raw_mode(arguments: Any) -> str:
    """How a decoder's pixels lie in the file, of the arguments that Pillow gives it."""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    native = {"little": "16L", "big": "16B"}[sys.byteorder]
    return first.replace("16N", native) if isinstance(first, str) else ""


def _values_of_bytes(image: Image.Image, again: ImageFile.ImageFile) -> np.ndarray:
    raw = _raw_mode(again.tile[0].args)
    other = _OTHER_BYTES[raw]
    again.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
        for tile in again.tile
    ]
    again.load()
    low = np.asarray(again)
    values = np.asarray(image) * 256.0 + (low[..., [1, 1, 1, 3]] if raw == _GREY_AND_ALPHA_16 else low)
    return values.reshape(*values.shape[:2], -1)


def _values_of_ppm(image: Image.Image, again: ImageFile.ImageFile) -> np.ndarray:
    return np.frombuffer(_data(again), ">u2", 3 * image.width * image.height).reshape(
        image.height, image.width, 3
    )


def _values_of_plain_ppm(image: Image.Image, again: ImageFile.ImageFile) -> np.ndarray:
    texts = _PPM_COMMENT.sub(b"", _data(again)).split()[: 3 * image.width * image.height]
    return np.array([int(text) for text in texts]).reshape(image.height, image.width, 3)


def _values_of_sgi(image: Image.Image, again: ImageFile.ImageFile) -> np.ndarray:
    """One channel after the other, from the lowest row up."""
    num_channels = len(image.getbands())
    planes = np.frombuffer(_data(again), ">u2", num_channels * image.width * image.height)
    return planes.reshape(num_channels, image.height, image.width)[:, ::-1].transpose(1, 2, 0)


def _data(again: ImageFile.ImageFile) -> bytes:
    """What follows a file's header."""
    assert again.fp is not None
    again.fp.seek(again.tile[0].offset)
    return again.fp.read()


def scaled_colour(image: Image.Image, values: np.ndarray) -> Image.Image:
    """16-bit channels, those of colour stretched together over their own range; alpha keeps its upper byte."""
    values = values.astype(np.float64)
    colour, see_through = stretched(values[..., :3]), image.info.get("transparency")
    colour = np.broadcast_to(colour, (*values.shape[:2], 3))
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
