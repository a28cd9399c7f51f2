"""YAML with the scalars of YAML 1.2's core schema and unique keys, read and written alike.

PyYAML speaks 1.1, where ``5e-5`` is a word, ``no`` is false and ``010`` is 8.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
]


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} stands twice in the mapping that begins in line {line}")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, as in YAML 1.2; 1.1 reads 010 as 8."""
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that ``_Loader`` would take for something else, such as ``1e5``."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def load(text: str) -> Any:
    """Raises   yaml.YAMLError  for what is not YAML, and for a key given twice"""
    return yaml.load(text, Loader=_Loader)


def dump(tree: Any) -> str:
    """Holds    ``load(dump(tree)) == tree`` for plain values; keys stay in order"""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def dump_value(value: Any) -> str:
    """A value in one line, as ``--set`` takes it."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
