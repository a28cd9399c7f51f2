"""Cells as the library ``datasets`` describes them: names for class numbers, values for JSON texts, however deep.

described = described_columns(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
as_described(row["answer"], described.get("answer"))
"""

from __future__ import annotations

import json
from typing import Any

from shared.errors import DataError, shortened

_LISTS = ("List", "LargeList", "Sequence")
_KINDS = ('"ClassLabel"', '"Json"')


def described_columns(features: Any) -> dict[str, Any]:
    """Of features as the library writes them down, those columns whose cells do not say it all themselves."""
    if not isinstance(features, dict):
        return {}
    texts = {str(name): json.dumps(described) for name, described in features.items()}
    return {
        str(name): described
        for name, described in features.items()
        if any(kind in texts[str(name)] for kind in _KINDS)
    }


def as_described(value: Any, described: Any) -> Any:
    """With a name in the place of each class number, None where the library has written -1 for none; JSON as values.

    A column whose values are of unlike types is one of JSON texts.

    Raises   DataError  for a text that is no JSON
    """
    if isinstance(described, list) and len(described) == 1:
        described = {"_type": "List", "feature": described[0]}
    if not isinstance(described, dict):
        return value
    kind = described.get("_type")
    inner = described.get("feature") if kind in _LISTS else described
    if isinstance(value, list):  # also where a list of structs is held column by column
        return [as_described(one, inner) for one in value]
    if kind == "Json":
        return _from_json(value)
    if kind == "ClassLabel":
        names = described.get("names")
        if isinstance(value, bool) or not isinstance(value, int) or not isinstance(names, list) or not names:
            return value
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, dict) and isinstance(inner, dict):
        return {name: as_described(part, inner.get(name)) for name, part in value.items()}
    return value


def _from_json(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shortened(text)!r} is no JSON, as the file says it is ({error})") from error
