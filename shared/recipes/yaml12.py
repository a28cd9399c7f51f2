"""YAML with the scalars of YAML 1.2's core schema and unique keys, read and written alike.

PyYAML speaks 1.1, where ``5e-5`` is a word, ``no`` is false and ``010`` is 8.  What is read is bounded, since a few
lines of aliases can stand for more values than a machine holds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_VALUES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = 1_000

_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
]


LINE_BREAKS = "\x85\u2028\u2029"  # of YAML 1.1; single quotes fold them, double quotes escape them


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key must be a word")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: key {key.value!r} stands twice in one mapping")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, as in YAML 1.2; 1.1 reads 010 as 8."""
        text = str(self.construct_scalar(node))
        if len(text) > MAX_DIGITS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of {len(text)} digits")
        return int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that ``_Loader`` would take for something else, such as ``1e5``, and escapes odd line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in LINE_BREAKS) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _TYPES
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def load(text: str) -> Any:
    """Raises   yaml.YAMLError  for what is not YAML, a key given twice, what is too long or too deep, and for half of
    a surrogate pair, which no file can hold
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (ValueError, KeyError) as error:
        raise yaml.YAMLError(f"a value is not of the type that its tag says ({error})") from error
    _require_bounded(tree)
    return tree


def _require_bounded(tree: Any) -> None:
    """Counts values as often as aliases name them, down to a depth, and stops at the bounds."""
    pending, count = [(tree, 1)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values, aliases counted as often as they stand")
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        for text in [value, *(value if isinstance(value, dict) else ())]:
            _require_unicode(text)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(one, depth + 1) for one in inner]


def _require_unicode(value: Any) -> None:
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise yaml.YAMLError(f"{value!a} is not valid Unicode") from error


def dump(tree: Any, *, allow_unicode: bool = True) -> str:
    """Holds    ``load(dump(tree)) == tree`` for plain values; keys stay in order

    allow_unicode  as it is, not as escapes
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=110)


def dump_value(value: Any) -> str:
    """A value in one line, as ``--set`` takes it."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
