"""Cells of a table as values: short floats as they read, names for class numbers, JSON texts as what they say.

described = described_columns(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
as_values(table.to_pylist()[0], table.schema, described)["answer"]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from shared.errors import DataError, shortened

_LISTS = ("List", "LargeList", "Sequence")
_ARROW_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
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


def as_values(row: Mapping[str, Any], schema: pa.Schema, described: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row as Arrow gives them, by column.

    described  by ``described_columns``
    Raises     DataError  as ``as_described``
    """
    return {
        field.name: as_described(_as_read(row[field.name], field.type), described.get(field.name))
        for field in schema
    }


def _as_read(value: Any, kind: pa.DataType) -> Any:
    """With floats of 16 and 32 bits as the shortest decimal of their type: 0.1, not 0.10000000149011612."""
    if value is None or "float" not in str(kind):  # a double is called so
        return value
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return value if value.is_integer() else float(str(kind.to_pandas_dtype()(value)))
    if pa.types.is_struct(kind):
        return {field.name: _as_read(value[field.name], field.type) for field in kind}
    if isinstance(kind, _ARROW_LISTS):
        return [_as_read(one, kind.value_type) for one in value]
    return value


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
