"""Types of keys that several sections have, with their bounds."""

from __future__ import annotations

import re
from datetime import date
from os.path import expanduser, expandvars
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MAX_NAME = 200  # bytes; most file systems take 255, and what is made beside it has a longer name
MAX_INTEGER = 10**12  # so that products of them are within 64 bits
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def _iso_date(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"{text!r} is no date of the form 2026-01-31") from error


def _place(text: str) -> str:
    """With ``~`` and ``$NAME`` as a shell has them."""
    found = expanduser(expandvars(text))
    if left := _VARIABLE.search(found):
        raise ValueError(f"{text!r}: the environment variable {left[0]} is not set")
    if not found.strip() or any(ord(character) < 32 for character in found):
        raise ValueError(f"{found!r} is no path and no name")
    return found


def _folder_name(text: str) -> str:
    is_one = text.strip() == text and text not in {"", ".", ".."} and "/" not in text
    if not is_one or any(ord(character) < 32 for character in text):
        raise ValueError(f"{text!r} is not a folder name")
    if len(text.encode()) > MAX_NAME:
        raise ValueError(f"a name of {len(text.encode())} bytes; a folder's has at most {MAX_NAME}")
    return text


def _bounded(number: int) -> int:
    if number > MAX_INTEGER:
        raise ValueError(f"a number of {len(str(number))} digits; at most {MAX_INTEGER:,} is needed")
    return number


def _here(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text!r} is a URL, a local folder is needed. Name one, and copy it there afterwards"
        )
    return _place(text)


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_bounded)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_bounded)]
NumWorkers = Annotated[int, Field(ge=0, le=1024)]  # each takes a process and some hundred MiB
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # an int64: larger ones overflow, or are another one's alias
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # beyond, fp32 does not hold logits / T or T ** 2 well
Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moment never moves, and its bias correction divides by 0
Dtype = Literal["float32", "bfloat16"]
Split = Literal["train", "validation", "test"]
Date = Annotated[str, AfterValidator(_iso_date)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Place = Annotated[str, AfterValidator(_place)]  # a file or folder here, or a name or URL elsewhere
LocalPlace = Annotated[str, AfterValidator(_here)]  # a folder to write; a URL would become one of that name
