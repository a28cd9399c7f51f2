"""Any encoded picture becomes RGB in one documented way, so that teacher and student see the same pixels.

    image = decode_rgb(example.image, background="black", where="train row 17")

The rule, in order; ``CONVERSION_VERSION`` names it in fingerprints and changes when the rule does:

1. The first frame of an animation, the first page of a document.
2. The orientation that EXIF states is applied; EXIF that cannot be read is passed over.
3. More than 8 bits a channel: linear from the picture's own smallest to its own largest value, onto 0 to 255.
   Medical pictures use a small part of their range, so dividing by 256 would leave them all but black.  At most a
   thousandth of the pixels, further from the others than these are from each other, are dead or hot pixels: they
   become 0 or 255 and do not count for the range.  The channels of a colour picture share one range.  A picture of
   one value only has no contrast and becomes black.  In floating point, NaN is black, infinities are the ends.
   A TIFF whose white is zero is inverted.  Of JPEG 2000 and AVIF in colour, and of TIFF in CMYK or with premultiplied
   alpha, Pillow gives the upper 8 bits alone.
4. Transparency, in whatever form, is laid on a background: black unless the recipe says white.  Black is
   the surround of CT, MR, ultrasound and X-ray pictures, so a cut-out body looks as if it never was one.  Where
   every pixel is wholly transparent, transparency says nothing about the picture and is passed over.
5. The remaining modes (grey, palette, CMYK, YCbCr, LAB, HSV) as Pillow converts them, ICC profiles ignored.

Files are decoded strictly: checksums are compared where the format has them, and a JPEG with a marker where none
can be is damaged.  Formats are a list of ours, so that a data set cannot choose a parser that runs other programs.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from shared.data.deep_pixels import all_bits, scaled_colour, stretched
from shared.errors import DataError

Background = Literal["black", "white"]

CONVERSION_VERSION = 2
MAX_ASPECT_RATIO = 200  # Qwen's image processors refuse longer strips; here they are refused for every model

FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "JPEG2000",
    "GIF",
    "WEBP",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "PPM",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
)
PHOTOMETRIC = 262  # of TIFF
NO_SIZE = (0, 0)
NEARLY_BLACK = 32  # of 255; a picture whose brightest pixels are below shows next to nothing

# In a JPEG's compressed data FF is followed by 00 or by a restart; else it begins a segment.
_JPEG_SEGMENT = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
# Segments that may follow a scan: tables, another scan, comments, what applications write.
_JPEG_FOLLOWS = frozenset([0xC4, 0xCC, _JPEG_SCAN, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)])

_BACKGROUNDS: dict[str, tuple[int, int, int, int]] = {"black": (0, 0, 0, 255), "white": (255, 255, 255, 255)}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def decode_rgb(data: bytes, *, background: Background = "black", where: str = "picture") -> Image.Image:
    """The encoded picture ``data`` as an 8-bit RGB image.

    Raises   DataError  naming ``where``, when the bytes are no picture of ``FORMATS``, end too early, are damaged,
             unfold to more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, or show a strip of more than
             ``MAX_ASPECT_RATIO`` to 1.
    """
    with _told(data, where):
        with _opened(data) as image:
            _check_size(image.size, where)
            _require_sound(data, image)
        with _opened(data) as image:
            values = all_bits(image, lambda: _opened(data))
            upright = _upright(image if values is None else scaled_colour(image, values))
            return to_rgb(upright, background=background, white_is_zero=_white_is_zero(image))


def require_header(data: bytes, *, where: str) -> None:
    """Raises   DataError  as ``decode_rgb`` does, for what the file's header shows already"""
    with _told(data, where), _opened(data) as image:
        _check_size(image.size, where)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height by the file's header alone, before EXIF turns it; raises what Pillow raises."""
    with _opened(data) as image:
        return image.size


def size_by_header(data: bytes) -> tuple[int, int]:
    """As ``size_of``; ``NO_SIZE`` where the header does not say."""
    try:
        return size_of(data)
    except Exception:  # of many types; whoever decodes the picture says what is wrong with it
        return NO_SIZE


def doubt(image: Image.Image) -> str | None:
    """What makes one doubt that a decoded picture shows anything, or None; such a picture is used all the same."""
    values = np.asarray(image)
    if values.min() == values.max():
        return f"one colour only ({int(values.min())} of 255)"
    brightest = int(np.percentile(values.max(axis=-1), 99.9))
    return f"nearly black (brightest pixels {brightest} of 255)" if brightest < NEARLY_BLACK else None


def to_rgb(
    image: Image.Image, *, background: Background = "black", white_is_zero: bool = False
) -> Image.Image:
    """A loaded picture of any Pillow mode as 8-bit RGB, by points 3 to 5 of the module's rule.

    white_is_zero  of more than 8 bits: a larger value is darker
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image, background, white_is_zero=white_is_zero)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (0, 0):
        return layer.convert("RGB")
    canvas = Image.new("RGBA", image.size, _BACKGROUNDS[background])
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")


@contextmanager
def _told(data: bytes, where: str) -> Iterator[None]:
    """Whatever goes wrong with a picture becomes a DataError that names it."""
    if not data:
        raise DataError(f"{where}: the picture has no bytes; an encoded picture file is needed")
    try:
        yield
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: the picture is too large to decode ({error})") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise DataError(
            f"{where}: the picture cannot be decoded ({type(error).__name__}: {error}); "
            f"found {len(data)} bytes beginning {data[:8]!r}, needed a whole picture file of {', '.join(FORMATS)}"
        ) from error


def _opened(data: bytes) -> ImageFile.ImageFile:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _require_sound(data: bytes, image: Image.Image) -> None:
    """What Pillow's decoders pass over: PNG checksums, and foreign bytes in the scans of a JPEG."""
    if image.format not in ("JPEG", "MPO"):
        image.verify()
        return
    place = _first_scan(data)
    while found := _JPEG_SEGMENT.search(data, place):
        marker = found[1][0]
        if marker == _JPEG_END:
            return
        if marker not in _JPEG_FOLLOWS:
            raise OSError(f"damaged: marker {marker:02x} at byte {found.start()} of the compressed data")
        place = found.end() + _length_at(data, found.end())


def _first_scan(data: bytes) -> int:
    """Where a JPEG's compressed data begins; what is before it is passed by its lengths, a thumbnail too."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _JPEG_SCAN:
            return place
        if marker == 0xFF:  # a filling byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers that stand alone
            place += 2
        else:
            place += 2 + _length_at(data, place + 2)
    return len(data)  # of a form that is Pillow's to judge


def _length_at(data: bytes, place: int) -> int:
    return max(2, int.from_bytes(data[place : place + 2], "big"))


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


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF says so: Pillow inverts the values of at most 8 bits, and no others."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0


def _grey_to_rgb(image: Image.Image, background: Background, *, white_is_zero: bool) -> Image.Image:
    """One channel of more than 8 bits, stretched over its own range."""
    values = np.asarray(image).astype(np.float64)
    grey = stretched(-values if white_is_zero else values)
    transparent = image.info.get("transparency")  # PNG: one grey value that is see-through
    if isinstance(transparent, int):
        grey[values == transparent] = _BACKGROUNDS[background][0]
    return Image.fromarray(grey).convert("RGB")
