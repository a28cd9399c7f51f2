"""Texts of rows: trimmed at the ends, otherwise left as they are; one without a visible character is none."""

from __future__ import annotations

import math
import unicodedata
from decimal import Decimal
from typing import Any

from shared.errors import DataError

BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # Hangul fillers, an empty Braille cell


def required_text(value: Any, what: str, *, where: str) -> str:
    """A question or an answer, trimmed at the ends; a number is written out.

    Raises   DataError  naming ``where`` and ``what``, when it is no text and no finite number, or shows nothing
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: the {what} is missing (null)")
    value = written_out(value, what, where=where)
    if not isinstance(value, str):
        raise DataError(f"{where}: the {what} is a {type(value).__name__}; needed is one text")
    text = value.strip()
    if not text:
        raise DataError(f"{where}: the {what} is empty")
    if not is_visible(text):
        shown = ascii(text[:20])
        raise DataError(f"{where}: the {what} has no visible character, only {shown}")
    require_unicode(text, what, where=where)
    return text


def require_unicode(text: str, what: str, *, where: str) -> None:
    """Raises   DataError  when the text holds half of a surrogate pair"""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the {what} is not valid Unicode ({error})") from error


def is_visible(text: str) -> bool:
    """Whether any character is more than a space, a control, a format character or a letter blank by definition."""
    return any(
        character not in BLANK_LETTERS and unicodedata.category(character)[0] not in "ZC"
        for character in text
    )


def written_out(value: Any, what: str, *, where: str) -> Any:
    """A number as its text; anything else, and no number (NaN), as it is.

    Raises   DataError  naming ``where`` and ``what``, for a number that is infinite, or has thousands of digits
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
        return value
    if not isinstance(value, int) and math.isinf(value):
        raise DataError(f"{where}: the {what} is {value}, no finite number")
    try:
        return format(value, "f") if isinstance(value, Decimal) else str(value)
    except ValueError as error:
        raise DataError(f"{where}: the {what} is a number that cannot be written out ({error})") from error
