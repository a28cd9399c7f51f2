"""The encoded pictures of a row, from whatever its cells hold: bytes, paths, ``datasets`` pictures, URLs.

    pictures = [read_picture(one, folder, where="train, row 17") for one in listed_pictures(row["images"])]
    pictures[0].data, pictures[0].file

Nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from shared.data.copies import Stamp
from shared.errors import DataError, NotAFileError, shortened
from shared.regular_files import naming, open_regular

MAX_PATH = 4096  # characters; a longer text is none
MAX_DATA_URL = 64 * 2**20  # characters, of which three quarters are the picture's bytes
# Of files that are pictures, also of kinds that are not read: a row that names one is not one of text alone.
_SUFFIX = re.compile(
    r"\.(png|jpe?g|jpe|jfif|jp2|gif|webp|avif|tiff?|bmp|ppm|tga|ico|pcx|sgi|hei[cf]|jxl|svg|dcm|dicom|nii(\.gz)?)$",
    re.IGNORECASE,
)
_DATA_URL = re.compile(r"data:[^,;]*(;[^,;]*)*?;base64,", re.IGNORECASE)
# What files of these kinds begin with: PNG, JPEG, GIF, TIFF (three), JPEG 2000; WebP and AVIF say so behind a length.
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"\0\0\0\x0cjP  ")
_BEHIND_LENGTH = (b"WEBP", b"avif")
MIN_BASE64 = 64  # characters; no picture's file is shorter than their bytes
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+[=\s]*")
_NO_BLANKS = str.maketrans("", "", string.whitespace)  # of ASCII, as lines of base64 end in it
_OF_SOUNDS = (b"RIFF", b"OggS", b"fLaC", b"ID3")
_BYTES_OR_PATH = "needed are encoded bytes, the path of a file or a data: URL"


@dataclass(frozen=True)
class PictureFile:
    """A file that a picture was read from, as it was then; ``path`` is what the row says, below the row's folder."""

    path: str
    stamp: Stamp


@dataclass(frozen=True)
class Picture:
    """An encoded picture, and the file it lies in; None where the row itself holds it."""

    data: bytes
    file: PictureFile | None = None


def listed_pictures(value: Any) -> list[Any]:
    """What a cell holds, one element a picture; none where it is null."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def is_nothing(value: Any) -> bool:
    """Null, an empty text, the NaN that a table without nulls has for it; a struct of nulls, a list of such alone."""
    if isinstance(value, list | tuple):
        return all(not isinstance(one, list | tuple) and is_nothing(one) for one in value)
    if isinstance(value, Mapping):
        return all(one is None for one in value.values())
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def looks_like_pictures(value: Any) -> bool:
    """Whether a cell seems to hold pictures: such a file, its name or base64, a URL of either, a picture's struct."""
    if isinstance(value, list | tuple):
        return bool(value) and looks_like_pictures(value[0])
    if isinstance(value, bytes):
        return _begins_a_picture(value)
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if isinstance(data, bytes) and not data.startswith(_OF_SOUNDS):
            return True
        return looks_like_pictures(data) or looks_like_pictures(value.get("path"))
    if not isinstance(value, str):
        return False
    if value[:11].lower() == "data:image/" or _is_base64_of_a_picture(value):
        return True
    name = re.split(r"[?#]", value[:MAX_PATH])[0] if _is_web_address(value) else value[-MAX_PATH:]
    return bool(_SUFFIX.search(name.strip()))


def _begins_a_picture(data: bytes) -> bool:
    return data.startswith(_BEGINNINGS) or data[8:12] in _BEHIND_LENGTH


def _is_web_address(text: str) -> bool:
    return "://" in text[:MAX_PATH]


def _is_base64_of_a_picture(text: str) -> bool:
    """Judged by its first bytes; a path does not begin as files of pictures do."""
    if len(text) < MIN_BASE64:
        return False
    head = text[:MIN_BASE64].translate(_NO_BLANKS)
    try:
        begins = _begins_a_picture(base64.b64decode(head[: len(head) // 4 * 4], validate=True))
    except (binascii.Error, ValueError):
        return False
    return begins and _BASE64.fullmatch(text) is not None


def of_base64(text: str) -> str:
    """The ``data:`` URL of an encoded picture in base64; one that is such a URL stays."""
    return text if text[:5].lower() == "data:" else f"data:image/any;base64,{text}"


def read_picture(value: Any, folder: Path | None, *, where: str) -> Picture:
    """The encoded file, from one element of a cell.

    folder   where relative paths start
    Raises   DataError  naming ``where``, when it is nothing of the kind or cannot be read
    """
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        data = value.get("bytes")
        if isinstance(data, str) and data:
            data = of_base64(data)
        value = value.get("path") if data is None else data
    if value is None or value == "":
        raise DataError(f"{where}: the picture is missing ({'null' if value is None else 'an empty text'})")
    if isinstance(value, bytes):
        return Picture(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the picture is a {type(value).__name__}; {_BYTES_OR_PATH}")
    if _is_base64_of_a_picture(value):
        value = of_base64(value)
    if value[:5].lower() == "data:":
        return Picture(_decoded(value, where=where))
    if value.startswith("file://"):
        value = unquote(value.removeprefix("file://"))
    if _is_web_address(value):
        raise DataError(
            f"{where}: the picture is a URL, {shortened(value)}; {_BYTES_OR_PATH}. "
            "Nothing is fetched: download the picture first"
        )
    if len(value) > MAX_PATH:
        raise DataError(
            f"{where}: the picture is a text of {len(value):,} characters, {shortened(value)!r}, and no path; "
            f"{_BYTES_OR_PATH}. Decode base64 before you save it"
        )
    return _read(value, folder or Path(), where=where)


def _read(named: str, folder: Path, *, where: str) -> Picture:
    path = folder / named
    try:
        with naming(path), open_regular(path) as stream:
            stamp = Stamp.of_status(os.fstat(stream.fileno()))
            return Picture(stream.read(), PictureFile(named, stamp))
    except NotAFileError as error:
        raise DataError(f"{where}: the picture {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise DataError(f"{where}: the picture {shortened(str(path))} cannot be read ({reason})") from error


def _decoded(url: str, *, where: str) -> bytes:
    if len(url) > MAX_DATA_URL:
        raise DataError(
            f"{where}: the picture is a data: URL of {len(url):,} characters; at most {MAX_DATA_URL:,} are read. "
            "Save it as a file"
        )
    if (head := _DATA_URL.match(url[:MAX_PATH])) is None:
        raise DataError(f"{where}: the picture is {shortened(url)!r}; a data: URL must be base64")
    try:
        return base64.b64decode(url[head.end() :].translate(_NO_BLANKS), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the picture's data: URL is not base64 ({error})") from error
