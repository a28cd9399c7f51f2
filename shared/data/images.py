"""Any encoded picture becomes RGB in one documented way, so that teacher and student see the same pixels.

    image = decode_rgb(example.image, background="black", where="train row 17")

The rule, in order; ``CONVERSION_VERSION`` names it in fingerprints and changes when the rule does:

1. The first frame of an animation, the first page of a document.
2. The orientation that EXIF states is applied; EXIF that cannot be read is passed over.
3. More than 8 bits a pixel (``I``, ``I;16``, ``F``): linear from the picture's own smallest to its own
   largest value, onto 0 to 255.  Medical pictures use a small part of their range, so dividing by 256 would
   leave them all but black.  A picture of one value only has no contrast and becomes black.  In floating
   point, NaN counts as the smallest finite value, infinities as the ends.  (Of 16-bit colour, Pillow reads
   the upper 8 bits.)
4. Transparency, in whatever form, is laid on a background: black unless the recipe says white.  Black is
   the surround of CT, MR, ultrasound and X-ray pictures, so a cut-out body looks as if it never was one.
5. The remaining modes (grey, palette, CMYK, YCbCr, LAB, HSV) as Pillow converts them, ICC profiles ignored.
"""

from __future__ import annotations

import io
import struct
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from shared.errors import DataError

Background = Literal["black", "white"]

CONVERSION_VERSION = 1
MAX_ASPECT_RATIO = 200  # Qwen's image processors refuse longer strips; here they are refused for every model

_BACKGROUNDS: dict[str, tuple[int, int, int, int]] = {"black": (0, 0, 0, 255), "white": (255, 255, 255, 255)}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def decode_rgb(data: bytes, *, background: Background = "black", where: str = "picture") -> Image.Image:
    """The encoded picture ``data`` as an 8-bit RGB image.

    Raises   DataError  naming ``where``, when the bytes are no picture, end too early, unfold to more than
             ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, or show a strip of more than ``MAX_ASPECT_RATIO`` to 1.
    """
    if not data:
        raise DataError(f"{where}: the picture has no bytes; an encoded picture file is needed")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.size, where)
            image.load()
            return to_rgb(_upright(image), background=background)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: the picture is too large to decode ({error})") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise DataError(
            f"{where}: the picture cannot be decoded ({type(error).__name__}: {error}); "
            f"found {len(data)} bytes beginning {data[:8]!r}, needed a whole picture file"
        ) from error


def to_rgb(image: Image.Image, *, background: Background = "black") -> Image.Image:
    """A loaded picture of any Pillow mode as 8-bit RGB, by points 3 to 5 of the module's rule."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image, background)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, _BACKGROUNDS[background])
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"{where}: the picture has {width} x {height} pixels; at most {limit} are decoded")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{where}: the picture is a strip of {width} x {height} pixels; its longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter one. Crop or pad it, or allow the row to be left out "
            "(data.max_dropped)"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, EOFError, OSError, struct.error):
        return image


def _grey_to_rgb(image: Image.Image, background: Background) -> Image.Image:
    """One channel of more than 8 bits, stretched over its own range."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    level = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    spread = high - low
    grey = np.rint((level - low) * (255.0 / spread)) if spread > 0 else np.zeros_like(level)
    transparent = image.info.get("transparency")  # PNG: one grey value that is see-through
    if isinstance(transparent, int):
        grey[values == transparent] = _BACKGROUNDS[background][0]
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
