"""Text from data, made fit for a page: escaped, and with what nobody can see written out.

escape('"><script>')      # &quot;&gt;&lt;script&gt;
visible("a\\x00b")         # a\\x00b, four characters in the place of one
shorten("a" * 500, 20)    # aaaaaaaaa...aaaaaaaa
"""

from __future__ import annotations

import html
import unicodedata

REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MAX_LABEL = 48  # characters of a name in a figure


def escape(text: str) -> str:
    """For an element's text, or an attribute in quotes."""
    return html.escape(visible(text))


def visible(text: str) -> str:
    """Without control characters, lone surrogates and marks that reorder their surroundings.

    UTF-8 cannot hold a lone surrogate, XML no control character, and a reordering mark can make a wrong answer
    look like the right one.
    """
    return "".join(_written_out(mark) if _is_hidden(mark) else mark for mark in text)


def shorten(text: str, most: int) -> str:
    """At most so many characters: the beginning and the end."""
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[len(text) - end :]}"


def label(text: str) -> str:
    """A name for a figure: one short line.  Matplotlib leaves out of a legend what begins with an underscore."""
    line = shorten(" ".join(visible(text).split()), MAX_LABEL)
    return f" {line}" if line.startswith("_") else line


def token_text(text: str) -> str:
    """A token, its blanks and line ends shown as marks; an empty one is said to be empty."""
    marks = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
    return visible("".join(marks.get(mark, mark) for mark in text)) or "(empty)"


def _is_hidden(mark: str) -> bool:
    if mark in "\n\t":
        return False
    is_noncharacter = ord(mark) & 0xFFFE == 0xFFFE or "\ufdd0" <= mark <= "\ufdef"
    return unicodedata.category(mark) in ("Cc", "Cs") or mark in REORDERING or is_noncharacter


def _written_out(mark: str) -> str:
    return mark.encode("unicode_escape").decode("ascii")
