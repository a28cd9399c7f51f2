"""Types of keys that several sections have, with their bounds."""

from __future__ import annotations

from datetime import date
from os.path import expanduser
from typing import Annotated, Literal

from pydantic import AfterValidator, Field


def _iso_date(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"{text!r} is no date of the form 2026-01-31") from error


def _here(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text!r} is a URL, a local folder is needed. Name one, and copy it there afterwards"
        )
    return expanduser(text)


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NumWorkers = Annotated[int, Field(ge=0, le=1024)]  # each takes a process and some hundred MiB
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # an int64: larger ones overflow, or are another one's alias
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # beyond, fp32 does not hold logits / T or T ** 2 well
Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moment never moves, and its bias correction divides by 0
Dtype = Literal["float32", "bfloat16"]
Split = Literal["train", "validation", "test"]
Date = Annotated[str, AfterValidator(_iso_date)]
Place = Annotated[str, AfterValidator(expanduser)]  # a file or folder here, or a name or URL elsewhere
LocalPlace = Annotated[str, AfterValidator(_here)]  # a folder to write; a URL would become one of that name
