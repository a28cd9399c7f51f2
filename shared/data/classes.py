"""Class numbers as names, in columns that the library ``datasets`` describes as such, however deep.

described = described_classes(json.loads(schema.metadata[b"huggingface"]))
named(row["answer"], described["answer"])
"""

from __future__ import annotations

import json
from typing import Any

_LISTS = ("List", "LargeList", "Sequence")


def described_classes(features: Any) -> dict[str, Any]:
    """Of features as the library writes them down, those columns in which there are class numbers; else none."""
    if not isinstance(features, dict):
        return {}
    return {
        str(name): described
        for name, described in features.items()
        if '"ClassLabel"' in json.dumps(described)
    }


def named(value: Any, described: Any) -> Any:
    """With a name in the place of each class number; None where there is none, which the library writes as -1."""
    if isinstance(described, list) and len(described) == 1:
        described = {"_type": "List", "feature": described[0]}
    if not isinstance(described, dict):
        return value
    kind = described.get("_type")
    if kind == "ClassLabel":
        names = described.get("names")
        if isinstance(value, bool) or not isinstance(value, int) or not isinstance(names, list) or not names:
            return value
        return names[value] if 0 <= value < len(names) else None
    inner = described.get("feature") if kind in _LISTS else described
    if isinstance(value, list):
        return [named(one, inner) for one in value]
    if isinstance(value, dict) and isinstance(inner, dict):
        return {name: named(part, inner.get(name)) for name, part in value.items()}
    return value
